"""Which files a data set consists of: `resolve` recognises the layout, `DataSource` remembers it and reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from detrellis.data.doctor.findings import finding
from detrellis.data.files import files_in, hidden, is_image, subfolders
from detrellis.data.formats.coco import read_coco
from detrellis.data.formats.coco_files import coco_among, find_coco_files
from detrellis.data.formats.coco_images import Chosen, find_images
from detrellis.data.formats.csv_boxes import csv_splits, find_csv, read_csv
from detrellis.data.formats.labelme import find_labelme, is_labelme, labelme_files, read_labelme
from detrellis.data.formats.via import find_via, is_via, read_via, via_splits
from detrellis.data.formats.voc import find_voc, read_voc, voc_folders
from detrellis.data.formats.yolo import find_yolo, labels_without_names, read_yolo
from detrellis.data.records import RawDataset
from detrellis.data.splits import SPLITS, SplitFiles
from detrellis.errors import UserError

Kind = Literal["coco", "yolo", "voc", "labelme", "via", "csv"]

LOOKED_FOR = """Looked for
    COCO           annotations/instances_train.json (and _val), or train.json, or one COCO file of any name, and the
                   images anywhere near
    Roboflow COCO  train/_annotations.coco.json (and valid/)
    YOLO           data.yaml with names, train and val, or classes.txt with images/ and labels/ (or both in one folder)
    Pascal VOC     Annotations/*.xml and JPEGImages/, or a folder of XML files beside the images
    labelme        a JSON file for each image; VIA: one JSON file; CSV: filename,xmin,ymin,xmax,ymax,class"""
NAME_THEM = (
    "name what there is: `--train FILE` (.json of COCO or VIA, .csv) or `--train FOLDER` (XML of Pascal VOC, JSON of "
    "labelme), with `--train-images FOLDER` where the images are not near; the same with `--val` and `--val-images`."
)
REMEDY = f"Arrange it like one of these, or {NAME_THEM}"
MOST = 16  # folders that the message names
Given = Mapping[str, Path | None]  # split -> the image folder that the user named


READERS: Mapping[str, Callable[[Mapping[str, SplitFiles], Sequence[str]], dict[str, RawDataset]]] = {
    "yolo": read_yolo,
    "voc": read_voc,
    "labelme": read_labelme,
    "via": read_via,
    "csv": read_csv,
}


@dataclass(frozen=True)
class DataSource:
    """Kind and paths of a data set: small, and stored with a run so that the run can find its data again."""

    kind: Kind
    splits: Mapping[str, SplitFiles]  # "train", and "val" and "test" where there are such
    folder: Path | None = None  # that holds all of it, where a folder was given

    def load(self, split: str) -> RawDataset:
        """One split as its files have it."""
        return self.load_all([split])[split]

    def load_all(self, splits: Sequence[str] | None = None) -> dict[str, RawDataset]:
        """Several splits (default: all), read in one go."""
        wanted = [s for s in SPLITS if s in self.splits] if splits is None else list(splits)
        for split in wanted:
            if split not in self.splits:
                raise UserError(f"the data set has no split `{split}`", f"It has: {', '.join(self.splits)}.")
        return {split: self._noted(raw) for split, raw in self._read(wanted).items()}

    def _read(self, wanted: Sequence[str]) -> dict[str, RawDataset]:
        if self.kind in READERS:
            return READERS[self.kind](self.splits, wanted)
        files = {split: self.splits[split] for split in wanted}
        return {split: read_coco(f.annotations, f.images[0], split) for split, f in files.items()}

    def _noted(self, raw: RawDataset) -> RawDataset:
        """With what had to be decided to find its files."""
        files = self.splits[raw.split]
        if not files.note:
            return raw
        return replace(raw, findings=(finding("layout", raw.split, files.annotations, files.note), *raw.findings))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        splits = {name: files.to_dict() for name, files in self.splits.items()}
        return {"kind": self.kind, "splits": splits, "folder": None if self.folder is None else str(self.folder)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DataSource:
        """The inverse of `to_dict`."""
        splits = {name: SplitFiles.from_dict(files) for name, files in data["splits"].items()}
        return cls(cast(Kind, data["kind"]), splits, Path(data["folder"]) if data.get("folder") else None)


def resolve(
    data: Path | None = None,
    train: Path | None = None,
    train_images: Path | None = None,
    val: Path | None = None,
    val_images: Path | None = None,
) -> DataSource:
    """The data set in the folder `data`, or the one whose files are named.

    `data` may also be a YOLO yaml, or one COCO file. `train` and `val` are COCO files or folders of VOC's XML; their
    image folders are looked for where they are not given. Raises `UserError` where nothing is recognised.
    """
    given = {"train": train_images, "val": val_images}
    for folder in given.values():
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder}: no such folder of images", "Correct the path.")
    if data is not None and (train is not None or val is not None):
        raise UserError("both a data folder and annotation files are given", "Give --data, or --train and --val.")
    if train is not None:
        return _explicit({"train": train, "val": val}, given)
    if data is not None:
        return _folder(data, given)
    if val is not None:
        raise UserError(
            f"only {val} is given, as --val", "Give --train too; or this file as --train, to look at it alone."
        )
    named = [f"--{split}-images" for split, folder in given.items() if folder is not None]
    what = f"only {' and '.join(named)} given, but no annotations" if named else "no data set is given"
    raise UserError(what, "Give --data FOLDER, or --train FILE (or a FOLDER of XML or JSON) and --train-images FOLDER.")


def find_data(data: str | Path | DataSource | None, *files: str | Path | None) -> DataSource:
    """The data set in a folder, or of COCO files: train, its images, val, its images."""
    if isinstance(data, DataSource):
        return data
    paths = [None if f is None else Path(f) for f in files]
    return resolve(None if data is None else Path(data), *paths, *[None] * (4 - len(paths)))


def _explicit(files: Given, given: Given) -> DataSource:
    """The set whose annotation files, or folders of XML, are named."""
    named = {split: path for split, path in files.items() if path is not None}
    for path in named.values():
        _must_exist(path)
    folders = [path.is_dir() for path in named.values()]
    if any(folders) and not all(folders):
        listed = " and ".join(str(path) for path in named.values())
        raise UserError(f"{listed}: one is a file, the other a folder", "Give two files, or two folders of XML.")
    if all(folders) and all(_is_labelme(path) for path in named.values()):
        return DataSource("labelme", {split: labelme_files(path, split, given) for split, path in named.items()})
    if all(path.suffix.lower() == ".csv" for path in named.values()):
        return DataSource("csv", csv_splits(named, given))
    if not any(folders) and all(is_via(path) for path in named.values()):
        return DataSource("via", via_splits(named, given))
    if all(folders):
        return DataSource("voc", {split: _xml(path, split, given) for split, path in named.items()})
    return _coco(named, given)


def _is_labelme(folder: Path) -> bool:
    return any(is_labelme(file) for file in files_in(folder, ".json")[:8])


def _xml(folder: Path, split: str, given: Given) -> SplitFiles:
    folders = voc_folders(folder, given.get(split) or given.get("train"))
    if folders is None:
        coco = coco_among(files_in(folder, ".json"))
        there = f", but {coco[0].name} is COCO's: name the file" if coco else ""
        raise UserError(
            f"{folder}: no XML files of Pascal VOC in this folder{there}", f"{_counted(folder)} Or {NAME_THEM}"
        )
    return SplitFiles(folders[0], (folders[1],))


def _coco(files: Mapping[str, Path], given: Given, why: str = "") -> DataSource:
    """COCO files; many sets have one folder of images for both, so that of `train` is looked at for the others too."""
    nearby = [folder for folder in (given.get("train"),) if folder is not None]
    splits = {}
    for split, file in files.items():
        own = given.get(split)
        chosen = find_images(file.resolve(), nearby) if own is None else Chosen(own)
        note = "; ".join(filter(None, (why if split == "train" else "", chosen.why))) or None
        splits[split] = SplitFiles(file.resolve(), (chosen.folder.resolve(),), note=note)
    return DataSource("coco", splits)


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder", f"Correct the path; the current folder is {Path.cwd()}.")


def _folder(data: Path, given: Given) -> DataSource:
    _must_exist(data)
    data = data.resolve()
    source = _single_file(data, given) if data.is_file() else _recognised(data, given) or _nested(data, given)
    if source is None and (labels := labels_without_names(data)) is not None:
        what = (
            f"{data}: label files as YOLO has them, such as {labels.relative_to(data)}, but nothing names the classes"
        )
        raise UserError(what, f"Write {data / 'classes.txt'}, one name a line in the order of their numbers from 0.")
    if source is None:
        what = f"{data}: no data set was recognised in this folder.\n{LOOKED_FOR}\n{_what_is_there(data)}"
        raise UserError(what, REMEDY)
    if source.kind == "yolo" and any(given.values()):
        raise UserError("image folders are given for a YOLO data set", "Its yaml says where they are: correct that.")
    return replace(source, folder=data) if data.is_dir() else source


def _recognised(data: Path, given: Given) -> DataSource | None:
    """The data set in this very folder; None where there is none."""
    if splits := find_via(data, given):  # before COCO, whose files may have the same names
        return DataSource("via", splits)
    if found := find_coco_files(data):
        return _coco(found.files, given, found.why)
    if splits := find_yolo(data):
        return DataSource("yolo", splits)
    if splits := find_voc(data, given):
        return DataSource("voc", splits)
    if splits := find_labelme(data, given):
        return DataSource("labelme", splits)
    if splits := find_csv(data, given):
        return DataSource("csv", splits)
    return None


def _nested(data: Path, given: Given) -> DataSource | None:
    """The one data set in a folder of this folder, as archives are unpacked; `UserError` where there are several."""
    found: dict[Path, DataSource] = {}
    errors: list[UserError] = []
    for folder in subfolders(data, depth=1):
        try:
            if (source := _recognised(folder, given)) is not None:
                found[folder] = source
        except UserError as error:
            errors.append(error)
    if len(found) > 1:
        listed = ", ".join(folder.name for folder in found)
        raise UserError(f"{data}: more than one data set: {listed}", "Give one of these folders.")
    if not found and len(errors) == 1:
        raise errors[0]
    return next(iter(found.values()), None)


def _single_file(file: Path, given: Given) -> DataSource:
    if file.suffix.lower() == ".csv":
        return DataSource("csv", csv_splits({"train": file}, given, parts=True))
    if is_via(file):
        return DataSource("via", via_splits({"train": file}, given, parts=True))
    if file.suffix.lower() == ".json":
        return _coco({"train": file}, given)
    splits = find_yolo(file) if file.suffix.lower() in (".yaml", ".yml") else None
    if splits is None:
        raise UserError(f"{file}: neither a folder, nor a COCO .json, a YOLO .yaml or a .csv", REMEDY)
    return DataSource("yolo", splits)


def _what_is_there(data: Path) -> str:
    """The files by folder and kind, annotation files by name where they are few."""
    lines = [_counted(folder, data) for folder in [data, *subfolders(data, depth=2)]]
    told = [line for line in lines if line]
    if not told:
        return "Found nothing: the folder is empty."
    more = f"\n    and {len(told) - MOST} more folders" if len(told) > MOST else ""
    return "Found\n    " + "\n    ".join(told[:MOST]) + more


def _counted(folder: Path, data: Path | None = None) -> str:
    """`labels/: 12 .xml, 1 .csv (all.csv), 3 images`; "" of an empty folder."""
    names = sorted(entry.name for entry in folder.iterdir() if not hidden(entry.name) and entry.is_file())
    kinds: dict[str, list[str]] = {}
    for name in names:
        suffix = Path(name).suffix.lower()
        kinds.setdefault("images" if is_image(name) else suffix or "without a suffix", []).append(name)
    told = []
    for suffix, those in sorted(kinds.items(), key=lambda item: -len(item[1])):
        few = suffix != "images" and len(those) <= 3
        told.append(f"{len(those)} {suffix}{f' ({chr(44).join(those)})' if few else ''}")
    where = "here" if folder == data else f"{folder.relative_to(data)}/" if data else str(folder)
    return f"{where}: {', '.join(told)}" if told else "" if folder == data else f"{where}: no files"
