"""Where the files of one split are: what a layout finds and a reader is given."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from detrellis.data.findings import Finding, finding

Item = TypeVar("Item")

SPLITS: Mapping[str, tuple[str, ...]] = {  # our name, and what people call it
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
HELD_OUT = 5  # one image in so many is held out for validation where nothing says which


def held_out(stems: Iterable[str]) -> set[str]:
    """The images, by name without suffix, that validate where nothing says which do; at least one.

    A hash of the name decides, so that an image stays in its split when others are added.
    """
    ordered = sorted(set(stems), key=lambda stem: (_hash(stem), stem))
    return {stem for stem in ordered if _hash(stem) % HELD_OUT == 0} or set(ordered[:1])


def select_part(items: Sequence[Item], stem: Callable[[Item], str], part: str | None) -> list[Item]:
    """The items whose image trains or validates, by `part`; all of them where it is None.
    A single image does both.

    `stem` gives the name of an item's image, without suffix.
    """
    stems = [stem(item) for item in items]
    if part is None or len(set(stems)) == 1:
        return list(items)
    validating = held_out(stems)
    return [
        item
        for item, name in zip(items, stems, strict=True)
        if (name in validating) == (part == "val")
    ]


def both_parts(files: SplitFiles) -> dict[str, SplitFiles]:
    """Train and val of the same files, where nothing says which images are which."""
    return {
        part: replace(files, part=part, note=files.note if part == "train" else None)
        for part in ("train", "val")
    }


def deciding_splits(splits: Mapping[str, SplitFiles]) -> tuple[str, ...]:
    """The splits that say what the files of all mean, and which classes there are:
    training alone, or both parts of the same files.
    """
    files = splits.get("train")
    return ("train",) if files is None or files.part is None else ("train", "val")


def fixed_parts_note(split: str, files: SplitFiles, reason: str) -> list[Finding]:
    """The note that train and val are fixed parts of the same files, for a `reason`;
    one of the two splits has it.
    """
    if split != "train" or files.part is None:
        return []
    what = f"{reason}: a fixed {HELD_OUT - 1} in {HELD_OUT} images train, the others validate"
    return [finding("layout", split, files.annotations, what)]


def _hash(stem: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(stem.encode(errors="replace"), digest_size=8).digest(), "little"
    )


@dataclass(frozen=True)
class SplitFiles:
    """The paths of one split, absolute."""

    # COCO: the JSON file; YOLO: data.yaml or classes.txt; VOC: the folder of XML files
    annotations: Path
    # COCO, VOC: one folder; YOLO: folders of images and text files that list images
    images: tuple[Path, ...]
    listing: Path | None = None  # VOC: the file in ImageSets/Main that names the split's images
    # Where train and val are in the same files: "train" or "val"; see `select_part`
    part: str | None = None
    note: str | None = None  # what had to be decided to find them, which the doctor reports
