"""Which JSON files of a folder are COCO's, and of which split:
by their names, else by what is in them.
"""

from __future__ import annotations

import itertools
import mmap
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from detrellis.data.files import files_in, subfolders
from detrellis.data.formats.coco import HOLDS_FILES
from detrellis.data.formats.lookup import child, split_named
from detrellis.data.formats.pictures import listed
from detrellis.data.splits import SPLITS
from detrellis.errors import UserError

EXPORTED = ("_annotations.coco.json", "annotations.json")
NAME_THEM = "Name the files: --train ann.json --train-images folder --val ann.json."


class CocoFiles(NamedTuple):
    """The annotation file of each split, and why it was chosen; "" where its name says it."""

    files: dict[str, Path]
    why: str = ""
    parts: bool = False  # whether the one file is train and val together


def find_coco_files(data: Path) -> CocoFiles | None:
    """The COCO files of a folder; None where there are none.

    Raises `UserError` where several could be the same split's, or where none is for training.
    """
    named = {split: _conventional(data, names) for split, names in SPLITS.items()}
    files = {split: file for split, file in named.items() if file is not None}
    return CocoFiles(files) if "train" in files else _by_content(data)


def _conventional(data: Path, names: Sequence[str]) -> Path | None:
    """The split's annotation file;
    `UserError` where there are several of one kind, such as 2014 and 2017.
    """
    folders = (child(data, ("annotations",)) or data / "annotations", data)
    for place, prefix in itertools.product(folders, ("instances_", "")):
        # Not any train*.json: training logs and settings are called so too.
        name = rf"{prefix}({'|'.join(names)})\d*([_.-]?(annotations?|coco|labels|instances))*\.json"
        files = [f for f in files_in(place, ".json") if re.fullmatch(name, f.name, re.IGNORECASE)]
        if files:
            return _the_only(files, f"{place}: more than one file for `{names[0]}`")
    # In the split's own folder: as Roboflow exports it, else the only COCO file.
    own_folders = [folder for name in names if (folder := child(data, (name,))) is not None]
    for file in (folder / name for folder in own_folders for name in EXPORTED):
        if file.is_file():
            return file
    for folder in own_folders:
        if files := coco_among(files_in(folder, ".json")):
            return _the_only(files, f"{folder}: more than one COCO file for `{names[0]}`")
    return None


def _the_only(files: Sequence[Path], otherwise: str) -> Path:
    """The one file; `UserError` where there are several."""
    if len(files) > 1:
        raise UserError(f"{otherwise}: {', '.join(file.name for file in files)}", NAME_THEM)
    return files[0]


def _by_content(data: Path) -> CocoFiles | None:
    """COCO files of any name, at the top or in a folder for such."""
    folders = [
        data,
        *(folder for folder in subfolders(data, 1) if HOLDS_FILES.fullmatch(folder.name)),
    ]
    all_files = [file for folder in folders for file in coco_among(files_in(folder, ".json"))]
    files = [file for file in all_files if _has_boxes(file)] or all_files
    if not files:
        return None
    splits = [split_named(file.stem) for file in files]
    if len(files) == 1 and splits[0] in (None, "train"):
        if splits[0] is None:
            return CocoFiles({"train": files[0]}, parts=True)
        why = f"{files[0].relative_to(data)} is the only COCO file, so it is for training"
        return CocoFiles({"train": files[0]}, why)
    by_split = {split: file for split, file in zip(splits, files, strict=True) if split is not None}
    names = listed(file.relative_to(data) for file in files)
    if "train" not in by_split and None not in splits:
        raise UserError(f"{data}: no COCO file for training, only{names}", NAME_THEM)
    if len(by_split) < len(files):
        what = f"{data}: several COCO files, and their names do not say which split each is:{names}"
        raise UserError(what, NAME_THEM)
    return CocoFiles(by_split)


def looks_like_coco(file: Path) -> bool:
    """Whether the file has COCO's lists of images and annotations; it is searched, not parsed."""
    try:
        content = _searchable(file)
    except (OSError, ValueError):  # unreadable, or empty
        return False
    return all(re.search(rb'"%s"\s*:\s*\[' % key, content) for key in (b"images", b"annotations"))


def _has_boxes(file: Path) -> bool:
    """Whether it has objects with classes,
    which COCO's files of captions and of segments have not.
    """
    content = _searchable(file)
    has_classes = re.search(rb'"categories"\s*:', content) is not None
    return has_classes and re.search(rb'"segments_info"\s*:', content) is None


def _searchable(file: Path) -> bytes | mmap.mmap:
    """The file's bytes; of UTF-16 without the zeros, because what we look for is ASCII."""
    with file.open("rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return content[:].replace(b"\0", b"") if b"\0" in content[:4] else content


def coco_among(files: Iterable[Path]) -> list[Path]:
    """The JSON files among `files` that look like COCO's."""
    return [file for file in files if file.suffix.lower() == ".json" and looks_like_coco(file)]
