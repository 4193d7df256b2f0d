"""Which JSON files of a folder are COCO's, and of which split: by their names, else by what is in them."""

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
from detrellis.data.splits import SPLITS
from detrellis.errors import UserError

EXPORTED = ("_annotations.coco.json", "annotations.json")
NAME_THEM = "Name the files: --train ann.json --train-images folder --val ann.json."


class Files(NamedTuple):
    """The annotation file of each split, and what the choice was made by; "" where the names left none."""

    files: dict[str, Path]
    why: str = ""


def find_coco_files(data: Path) -> Files | None:
    """The COCO files of a folder; None where there are none.

    Raises `UserError` where several could be the same split's, or where none is for training.
    """
    named = {split: _conventional(data, names) for split, names in SPLITS.items()}
    found = {split: file for split, file in named.items() if file is not None}
    return Files(found) if "train" in found else _by_content(data)


def _conventional(data: Path, names: Sequence[str]) -> Path | None:
    """The split's annotation file; `UserError` where there are several of one kind, such as 2014 and 2017."""
    folders = (child(data, ("annotations",)) or data / "annotations", data)
    for place, prefix in itertools.product(folders, ("instances_", "")):
        # Not any train*.json: training logs and settings are called so too.
        name = rf"{prefix}({'|'.join(names)})\d*([_.-]?(annotations?|coco|labels|instances))*\.json"
        found = [f for f in files_in(place, ".json") if re.fullmatch(name, f.name, re.IGNORECASE)]
        if len(found) > 1:
            listed = ", ".join(f.name for f in found)
            raise UserError(f"{place}: more than one file for `{names[0]}`: {listed}", NAME_THEM)
        if found:
            return found[0]
    folders_of_split = [folder for name in names if (folder := child(data, (name,))) is not None]
    exported = (folder / file for folder in folders_of_split for file in EXPORTED)
    own = next((file for file in exported if file.is_file()), None)
    return own or next((file for folder in folders_of_split if (file := _only(folder, names[0])) is not None), None)


def _only(folder: Path, split: str) -> Path | None:
    found = [f for f in files_in(folder, ".json") if looks_like_coco(f)]
    if len(found) > 1:
        listed = ", ".join(f.name for f in found)
        raise UserError(f"{folder}: more than one COCO file for `{split}`: {listed}", NAME_THEM)
    return found[0] if found else None


def _by_content(data: Path) -> Files | None:
    """COCO files of any name, at the top or in a folder for such."""
    folders = [data, *(folder for folder in subfolders(data, 1) if HOLDS_FILES.fullmatch(folder.name))]
    alike = [f for folder in folders for f in files_in(folder, ".json") if looks_like_coco(f)]
    found = [f for f in alike if _has_boxes(f)] or alike
    if not found:
        return None
    listed = "".join(f"\n    {f.relative_to(data)}" for f in found)
    splits = [split_named(f.stem) for f in found]
    if len(found) == 1 and splits[0] in (None, "train"):
        return Files({"train": found[0]}, f"{found[0].relative_to(data)} is the only COCO file, so it is for training")
    assigned = {split: f for split, f in zip(splits, found, strict=True) if split is not None}
    if "train" not in assigned and None not in splits:
        raise UserError(f"{data}: no COCO file for training, only{listed}", NAME_THEM)
    if len(assigned) < len(found):
        raise UserError(
            f"{data}: several COCO files, and their names do not say which split each is:{listed}", NAME_THEM
        )
    return Files(assigned)


def looks_like_coco(file: Path) -> bool:
    """Whether the file has COCO's lists of images and annotations; it is searched, not parsed."""
    try:
        with file.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if b"\0" in data[:4]:
            return _has_lists(data[:].replace(b"\0", b""))  # UTF-16: what we look for is ASCII
        return _has_lists(data)
    except (OSError, ValueError):  # unreadable, or empty
        return False


def _has_boxes(file: Path) -> bool:
    """Whether it has objects with classes, which COCO's files of captions and of segments have not."""
    with file.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    text = data[:].replace(b"\0", b"") if b"\0" in data[:4] else data
    return re.search(rb'"categories"\s*:', text) is not None and re.search(rb'"segments_info"\s*:', text) is None


def _has_lists(data: bytes | mmap.mmap) -> bool:
    return all(re.search(rb'"%s"\s*:\s*\[' % key, data) for key in (b"images", b"annotations"))


def coco_among(files: Iterable[Path]) -> list[Path]:
    """Those that look like COCO files."""
    return [file for file in files if file.suffix.lower() == ".json" and looks_like_coco(file)]
