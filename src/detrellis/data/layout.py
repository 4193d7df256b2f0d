"""Which files a data set consists of:
`resolve` recognises the layout, `DataSource` remembers it and reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import TypeAdapter, ValidationError

from detrellis.data.files import files_in, hidden, is_image, subfolders
from detrellis.data.findings import finding
from detrellis.data.formats.coco import read_coco
from detrellis.data.formats.coco_files import coco_among, find_coco_files
from detrellis.data.formats.coco_images import ImageFolder, find_images
from detrellis.data.formats.csv_boxes import CSV, read_csv
from detrellis.data.formats.labelme import find_labelme, is_labelme, labelme_files, read_labelme
from detrellis.data.formats.lookup import split_named
from detrellis.data.formats.pictures import GivenImages, find_one_file, listed, one_file_splits
from detrellis.data.formats.via import VIA, is_via, read_via
from detrellis.data.formats.voc import find_voc, read_voc, voc_folders
from detrellis.data.formats.yolo import read_yolo
from detrellis.data.formats.yolo_files import find_yolo, labels_without_names
from detrellis.data.records import RawDataset
from detrellis.data.splits import SPLITS, SplitFiles, both_parts
from detrellis.errors import UserError, brief

Kind = Literal["coco", "yolo", "voc", "labelme", "via", "csv"]

LOOKED_FOR = """Looked for
    COCO           annotations/instances_train.json (and _val), or train.json, or one COCO file of any name, and the
                   images anywhere near
    Roboflow COCO  train/_annotations.coco.json (and valid/)
    YOLO           data.yaml with names, train and val, or classes.txt with images/ and labels/ (or both in one folder)
    Pascal VOC     Annotations/*.xml and JPEGImages/, or a folder of XML files beside the images
    labelme        a JSON file for each image; VIA: one JSON file; CSV: filename,xmin,ymin,xmax,ymax,class"""
NAME_THEM = (
    "name what there is: `--train FILE` (.json of COCO or VIA, .csv) or `--train FOLDER` (XML "
    "of Pascal VOC, JSON of labelme), with `--train-images FOLDER` where the images are not "
    "near; the same with `--val` and `--val-images`."
)
REMEDY = f"Export it as one of these from the tool that wrote it, or {NAME_THEM}"
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
MAX_SHOWN = 16  # folders that the message names

READERS: Mapping[
    str, Callable[[Mapping[str, SplitFiles], Sequence[str]], dict[str, RawDataset]]
] = {
    "yolo": read_yolo,
    "voc": read_voc,
    "labelme": read_labelme,
    "via": read_via,
    "csv": read_csv,
}


@dataclass(frozen=True)
class DataSource:
    """Kind and paths of a data set:
    small, and stored with a run so that the run can find its data again.
    """

    kind: Kind
    splits: Mapping[str, SplitFiles]  # "train", and "val" and "test" where there are such
    folder: Path | None = None  # that holds all of it, where a folder was given

    def load(self, split: str) -> RawDataset:
        """One split as its files have it, good or bad."""
        return self.load_all([split])[split]

    def load_all(
        self, splits: Sequence[str] | None = None, *, outlines: bool = False
    ) -> dict[str, RawDataset]:
        """Several splits (default: all), read in one go; `outlines` keeps those of COCO's files
        (`read_coco`). Raises `UserError` for a split that the data set has not."""
        wanted = [s for s in SPLITS if s in self.splits] if splits is None else list(splits)
        for split in wanted:
            if split not in self.splits:
                raise UserError(
                    f"the data set has no split `{split}`", f"It has: {', '.join(self.splits)}."
                )
        return {split: self._with_note(raw) for split, raw in self._read(wanted, outlines).items()}

    def _read(self, wanted: Sequence[str], outlines: bool) -> dict[str, RawDataset]:
        if self.kind in READERS:
            return READERS[self.kind](self.splits, wanted)
        files = {split: self.splits[split] for split in wanted}
        return {split: read_coco(split, f, outlines=outlines) for split, f in files.items()}

    def _with_note(self, raw: RawDataset) -> RawDataset:
        """With the finding of what had to be decided to find its files."""
        files = self.splits[raw.split]
        if not files.note:
            return raw
        return replace(
            raw,
            findings=(finding("layout", raw.split, files.annotations, files.note), *raw.findings),
        )

    def held_out(self) -> DataSource:
        """With a fixed one in five of the training images to validate on.
        `UserError` where there is a validation split."""
        if "val" in self.splits:
            raise UserError(
                "the data set has images to validate on already", "Leave out --hold-out."
            )
        return replace(self, splits={**self.splits, **both_parts(self.splits["train"])})

    def as_whole(self) -> DataSource:
        """Where train and val are parts of the same files: all of their images, as `train`."""
        train = self.splits["train"]
        if train.part is None:
            return self
        others = {split: files for split, files in self.splits.items() if split != "val"}
        return replace(self, splits={**others, "train": replace(train, part=None)})

    def divided_as(self, other: DataSource) -> DataSource:
        """With images held out to validate on if `other` has such, and with none if it has no
        validation split: it is the same set, in another place or read by an earlier version.
        """
        if "val" not in other.splits:
            return self.as_whole()
        held = other.splits["val"].part is not None and "val" not in self.splits
        return self.held_out() if held else self

    def to_dict(self) -> dict[str, Any]:
        """Kind and paths as JSON holds them."""
        return cast(dict[str, Any], _stored().dump_python(self, mode="json"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DataSource:
        """The data set of which `to_dict` gave kind and paths. `UserError` for anything else."""
        try:
            return _stored().validate_python(data)
        except ValidationError:
            what = f"the place of the data set cannot be understood: {brief(dict(data))}"
            raise UserError(what, "Name the data set: --data FOLDER.") from None


@cache
def _stored() -> TypeAdapter[DataSource]:
    """How it is stored."""
    return TypeAdapter(DataSource)


def resolve(
    data: Path | None = None,
    train: Path | None = None,
    train_images: Path | None = None,
    val: Path | None = None,
    val_images: Path | None = None,
) -> DataSource:
    """The data set in the folder `data`, or the one whose files are named.

    `data` may also be a YOLO yaml, or one COCO file. `train` and `val` are COCO files or folders of
    VOC's XML; their image folders are looked for where they are not given. Raises `UserError` where
    nothing is recognised.
    """
    given = {"train": train_images, "val": val_images}
    for folder in given.values():
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder}: no such folder of images", "Correct the path.")
    if data is not None and (train is not None or val is not None):
        raise UserError(
            "both a data folder and annotation files are given",
            "Give --data, or --train and --val.",
        )
    if train is not None:
        return _explicit({"train": train, "val": val}, given)
    if data is not None:
        return _folder(data, given)
    if val is not None:
        raise UserError(
            f"only {val} is given, as --val",
            "Give --train too; or this file as --train, to look at it alone.",
        )
    named = [f"--{split}-images" for split, folder in given.items() if folder is not None]
    what = (
        f"only {' and '.join(named)} given, but no annotations" if named else "no data set is given"
    )
    raise UserError(
        what,
        (
            "Give --data FOLDER, or --train FILE (or a FOLDER of XML or JSON) and --train-images "
            "FOLDER."
        ),
    )


def find_data(data: str | Path | DataSource | None, *files: str | Path | None) -> DataSource:
    """The data set in a folder, or of named files:
    train, its images, val, its images. Raises as `resolve`.
    """
    if isinstance(data, DataSource):
        return data
    paths = [None if f is None else Path(f) for f in files]
    return resolve(None if data is None else Path(data), *paths, *[None] * (4 - len(paths)))


def _explicit(files: Mapping[str, Path | None], given: GivenImages) -> DataSource:
    """The set whose annotation files, or folders of XML or JSON, are named."""
    named = {split: path for split, path in files.items() if path is not None}
    for path in named.values():
        _must_exist(path)
    are_folders = [path.is_dir() for path in named.values()]
    if all(are_folders):
        return _explicit_folders(named, given)
    if any(are_folders):
        both = " and ".join(str(path) for path in named.values())
        raise UserError(
            f"{both}: one is a file, the other a folder", "Give two files, or two folders of XML."
        )
    if all(is_via(path) for path in named.values()):
        return DataSource("via", one_file_splits(VIA, named, given))
    if all(path.suffix.lower() == ".csv" for path in named.values()):
        return DataSource("csv", one_file_splits(CSV, named, given))
    return _coco(named, given)


def _explicit_folders(folders: Mapping[str, Path], given: GivenImages) -> DataSource:
    if all(_is_labelme_folder(folder) for folder in folders.values()):
        return DataSource(
            "labelme", {split: labelme_files(f, split, given) for split, f in folders.items()}
        )
    return DataSource(
        "voc", {split: _xml(folder, split, given) for split, folder in folders.items()}
    )


def _is_labelme_folder(folder: Path) -> bool:
    return any(is_labelme(file) for file in files_in(folder, ".json")[:8])


def _xml(folder: Path, split: str, given: GivenImages) -> SplitFiles:
    folders = voc_folders(folder, given.get(split) or given.get("train"))
    if folders is None:
        coco = coco_among(files_in(folder, ".json"))
        hint = f", but {coco[0].name} is COCO's: name the file" if coco else ""
        raise UserError(
            f"{folder}: no XML files of Pascal VOC in this folder{hint}",
            f"{_counted(folder)} Or {NAME_THEM}",
        )
    annotations, images = folders
    return SplitFiles(annotations, (images,))


def _coco(
    files: Mapping[str, Path], given: GivenImages, why: str = "", *, parts: bool = False
) -> DataSource:
    """COCO files; many sets have one folder of images for both,
    so that of `train` is looked at for the others too. `parts`: the one file is train and val
    together.
    """
    nearby = [folder for folder in (given.get("train"),) if folder is not None]
    splits = {}
    for split, path in files.items():
        file, images = path.resolve(), given.get(split)
        chosen = find_images(file, nearby) if images is None else ImageFolder(images)
        note = "; ".join(filter(None, (why if split == "train" else "", chosen.why))) or None
        splits[split] = SplitFiles(file, (chosen.folder.resolve(),), note=note)
    return DataSource("coco", both_parts(splits["train"]) if parts else splits)


def _must_exist(path: Path) -> None:
    if re.match(r"[a-z0-9+.-]{2,}:/", str(path), re.IGNORECASE):  # not C:/
        raise UserError(
            f"{path}: a URL, not a file or folder",
            "Download it first, unpack it, and give the folder.",
        )
    if path.suffix.lower() in ARCHIVES and path.is_file():
        raise UserError(f"{path}: an archive", "Unpack it, and give the folder.")
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder",
            f"Correct the path; the current folder is {Path.cwd()}.",
        )


def _folder(data: Path, given: GivenImages) -> DataSource:
    _must_exist(data)
    data = data.resolve()
    source = (
        _single_file(data, given)
        if data.is_file()
        else _recognised(data, given) or _nested(data, given)
    )
    if source is None:
        raise _nothing_recognised(data)
    if source.kind == "yolo" and any(given.values()):
        raise UserError(
            "image folders are given for a YOLO data set",
            "Its yaml says where they are: correct that.",
        )
    return replace(source, folder=data) if data.is_dir() else source


def _nothing_recognised(data: Path) -> UserError:
    if (labels := labels_without_names(data)) is not None:
        file = labels.relative_to(data)
        return UserError(
            f"{data}: label files as YOLO has them, such as {file}, but nothing names the classes",
            f"Write {data / 'classes.txt'}, one name a line in the order of their numbers from 0.",
        )
    what = (
        f"{data}: no data set was recognised in this "
        f"folder.\n{LOOKED_FOR}\n{_folder_contents(data)}"
    )
    return UserError(what, REMEDY)


def _recognised(data: Path, given: GivenImages) -> DataSource | None:
    """The data set in this very folder; None where there is none."""
    # Before COCO, whose files may have the same names
    if splits := find_one_file(VIA, data, given):
        return DataSource("via", splits)
    if coco := find_coco_files(data):
        return _coco(coco.files, given, coco.why, parts=coco.parts)
    if splits := find_yolo(data):
        return DataSource("yolo", splits)
    if splits := find_voc(data, given):
        return DataSource("voc", splits)
    if splits := find_labelme(data, given):
        return DataSource("labelme", splits)
    if splits := find_one_file(CSV, data, given):
        return DataSource("csv", splits)
    return None


def _nested(data: Path, given: GivenImages) -> DataSource | None:
    """The one data set in a folder of this folder, as archives are unpacked;
    `UserError` where there are several.
    """
    sources: dict[Path, DataSource] = {}
    errors: list[UserError] = []
    for folder in subfolders(data, depth=1):
        try:
            if (source := _recognised(folder, given)) is not None:
                sources[folder] = source
        except UserError as error:
            errors.append(error)
    if len(sources) > 1:
        names = ", ".join(folder.name for folder in sources)
        raise UserError(f"{data}: more than one data set: {names}", "Give one of these folders.")
    if not sources and len(errors) == 1:
        raise errors[0]
    return next(iter(sources.values()), None)


def _single_file(file: Path, given: GivenImages) -> DataSource:
    if is_via(file):
        return DataSource("via", one_file_splits(VIA, {"train": file}, given, parts=True))
    if file.suffix.lower() == ".csv":
        return DataSource("csv", one_file_splits(CSV, {"train": file}, given, parts=True))
    if file.suffix.lower() == ".json":
        return _coco({"train": file}, given, parts=split_named(file.stem) is None)
    splits = find_yolo(file) if file.suffix.lower() in (".yaml", ".yml") else None
    if splits is None:
        raise UserError(
            f"{file}: neither a folder, nor a COCO .json, a YOLO .yaml or a .csv", REMEDY
        )
    return DataSource("yolo", splits)


def _folder_contents(data: Path) -> str:
    """The files by folder and kind, annotation files by name where they are few."""
    lines = [
        line for folder in [data, *subfolders(data, depth=2)] if (line := _counted(folder, data))
    ]
    if not lines:
        return "Found nothing: the folder is empty."
    more = f"\n    and {len(lines) - MAX_SHOWN} more folders" if len(lines) > MAX_SHOWN else ""
    return f"Found{listed(lines[:MAX_SHOWN])}{more}"


def _counted(folder: Path, data: Path | None = None) -> str:
    """`labels/: 12 .xml, 1 .csv (all.csv), 3 images`; "" of an empty folder."""
    names = sorted(
        entry.name for entry in folder.iterdir() if not hidden(entry.name) and entry.is_file()
    )
    kinds: dict[str, list[str]] = {}
    for name in names:
        suffix = Path(name).suffix.lower()
        kinds.setdefault("images" if is_image(name) else suffix or "without a suffix", []).append(
            name
        )
    counts = []
    for kind, files in sorted(kinds.items(), key=lambda item: -len(item[1])):
        few = kind != "images" and len(files) <= 3
        counts.append(f"{len(files)} {kind} ({','.join(files)})" if few else f"{len(files)} {kind}")
    where = "here" if folder == data else f"{folder.relative_to(data)}/" if data else str(folder)
    if counts:
        return f"{where}: {', '.join(counts)}"
    return "" if folder == data else f"{where}: no files"
