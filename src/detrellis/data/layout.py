"""Which files a data set consists of: `resolve` recognises the layout, `DataSource` remembers it and reads it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from detrellis.data.coco import find_images, read_coco
from detrellis.data.files import is_image, subfolders
from detrellis.data.records import RawDataset
from detrellis.data.splits import SPLITS, SplitFiles
from detrellis.data.voc import find_voc, read_voc, voc_folders
from detrellis.data.yolo import find_yolo, read_yolo
from detrellis.errors import UserError

Kind = Literal["coco", "yolo", "voc"]

LOOKED_FOR = """Looked for
    COCO           annotations/instances_train.json (and _val), or train.json, and the images anywhere near
    Roboflow COCO  train/_annotations.coco.json (and valid/)
    YOLO           data.yaml with names, train and val, or classes.txt with images/ and labels/
    Pascal VOC     Annotations/*.xml and JPEGImages/, or a folder of XML files beside the images"""
REMEDY = "Arrange it like one of these, or name the files: --train ann.json --train-images folder --val ann.json."


@dataclass(frozen=True)
class DataSource:
    """Kind and paths of a data set: small, and stored with a run so that the run can find its data again."""

    kind: Kind
    splits: Mapping[str, SplitFiles]  # "train", and "val" and "test" where there are such

    def load(self, split: str) -> RawDataset:
        """One split as its files have it."""
        return self.load_all([split])[split]

    def load_all(self, splits: Sequence[str] | None = None) -> dict[str, RawDataset]:
        """Several splits (default: all), read in one go."""
        wanted = [s for s in SPLITS if s in self.splits] if splits is None else list(splits)
        for split in wanted:
            if split not in self.splits:
                raise UserError(f"the data set has no split `{split}`", f"It has: {', '.join(self.splits)}.")
        if self.kind == "voc":
            return read_voc(self.splits, wanted)
        files = {split: self.splits[split] for split in wanted}
        if self.kind == "yolo":
            return {split: read_yolo(f, split) for split, f in files.items()}
        return {split: read_coco(f.annotations, f.images[0], split) for split, f in files.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"kind": self.kind, "splits": {name: files.to_dict() for name, files in self.splits.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DataSource:
        """The inverse of `to_dict`."""
        splits = {name: SplitFiles.from_dict(files) for name, files in data["splits"].items()}
        return cls(cast(Kind, data["kind"]), splits)


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
    if data is not None and (train is not None or val is not None):
        raise UserError("both a data folder and annotation files are given", "Give --data, or --train and --val.")
    if data is None and train is None:
        raise UserError("no data set is given", "Give --data folder, or --train ann.json --train-images folder.")
    if train is not None:
        return _explicit(train, train_images, val, val_images)
    assert data is not None
    if train_images is not None or val_images is not None:
        return _with_images(_folder(data), train_images, val_images)
    return _folder(data)


def find_data(data: str | Path | DataSource | None, *files: str | Path | None) -> DataSource:
    """The data set in a folder, or of COCO files: train, its images, val, its images."""
    if isinstance(data, DataSource):
        return data
    paths = [None if f is None else Path(f) for f in files]
    return resolve(None if data is None else Path(data), *paths, *[None] * (4 - len(paths)))


def _explicit(train: Path, train_images: Path | None, val: Path | None, val_images: Path | None) -> DataSource:
    given = {"train": (train, train_images)}
    if val is not None:
        given["val"] = (val, val_images)
    folders = [path.is_dir() for path, _ in given.values()]
    if any(folders) and not all(folders):
        raise UserError(f"{train} and {val}: one is a file, the other a folder", "Give two COCO files, or two of XML.")
    nearby = [train_images] if train_images is not None else []  # many sets have one folder of images for both
    splits = {split: _named(path, images, nearby) for split, (path, images) in given.items()}
    return DataSource("voc" if folders[0] else "coco", splits)


def _named(annotations: Path, images: Path | None, nearby: Sequence[Path] = ()) -> SplitFiles:
    _must_exist(annotations)
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder of images", "Correct the path.")
    if not annotations.is_dir():
        file = annotations.resolve()
        return SplitFiles(file, ((images or find_images(file, nearby)).resolve(),))
    folders = voc_folders(annotations, images or next(iter(nearby), None))
    if folders is None:
        raise UserError(f"{annotations}: no XML files of Pascal VOC in this folder", REMEDY)
    return SplitFiles(folders[0], (folders[1],))


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder", f"Correct the path; the current folder is {Path.cwd()}.")


def _folder(data: Path) -> DataSource:
    _must_exist(data)
    data = data.resolve()
    if data.is_file():
        return _single_file(data)
    if splits := _find_coco(data):
        return DataSource("coco", splits)
    if splits := find_yolo(data):
        return DataSource("yolo", splits)
    if splits := find_voc(data):
        return DataSource("voc", splits)
    raise UserError(f"{data}: no data set was recognised in this folder.\n{LOOKED_FOR}\n{_what_is_there(data)}", REMEDY)


def _single_file(file: Path) -> DataSource:
    if file.suffix.lower() == ".json":
        return DataSource("coco", {"train": _named(file, None)})
    splits = find_yolo(file) if file.suffix.lower() in (".yaml", ".yml") else None
    if splits is None:
        raise UserError(f"{file}: neither a folder, nor a COCO .json, nor a YOLO .yaml", REMEDY)
    return DataSource("yolo", splits)


def _with_images(source: DataSource, train: Path | None, val: Path | None) -> DataSource:
    """The same with other image folders."""
    if source.kind == "yolo":
        raise UserError("image folders are given for a YOLO data set", "Its yaml says where they are: correct that.")
    splits = dict(source.splits)
    for split, images in (("train", train), ("val", val)):
        if images is not None and split in splits:
            _must_exist(images)
            old = splits[split]
            splits[split] = SplitFiles(old.annotations, (images.resolve(),), old.listing, old.part)
    return DataSource(source.kind, splits)


def _find_coco(data: Path) -> dict[str, SplitFiles] | None:
    files = {split: _coco_file(data, names) for split, names in SPLITS.items()}
    found = {split: file for split, file in files.items() if file is not None}
    if "train" not in found:
        return None
    return {split: SplitFiles(file, (find_images(file).resolve(),)) for split, file in found.items()}


def _coco_file(data: Path, names: Sequence[str]) -> Path | None:
    """The split's annotation file; `UserError` where there are several of one kind, such as 2014 and 2017."""
    for folder, prefix in itertools.product((data / "annotations", data), ("instances_", "")):
        # Not any train*.json: training logs and settings are called so too.
        name = rf"{prefix}({'|'.join(names)})\d*([_.-]?(annotations?|coco|labels|instances))*\.json"
        found = sorted(f for f in folder.glob("*.json") if re.fullmatch(name, f.name, re.IGNORECASE))
        if len(found) > 1:
            listed = ", ".join(f.name for f in found)
            raise UserError(f"{folder}: more than one file for `{names[0]}`: {listed}", REMEDY)
        if found:
            return found[0]
    exported = (data / name / file for name in names for file in ("_annotations.coco.json", "annotations.json"))
    return next((file for file in exported if file.is_file()), None)


def _what_is_there(data: Path) -> str:
    files = sorted(p.name for p in data.iterdir() if p.is_file())
    folders = [str(p.relative_to(data)) + "/" for p in subfolders(data, depth=2)]
    if not files and not folders:
        return "Found nothing: the folder is empty."
    images = sum(is_image(name) for name in files)
    others = [name for name in files if not is_image(name)]
    shown = [*([f"{images} images"] if images else []), *folders[:12], *others[:12]]
    more = len(folders[12:]) + len(others[12:])
    return f"Found {', '.join(shown)}{f' and {more} more' if more else ''}."
