"""Where the files of one split are: what a layout finds and a reader is given."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

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

    `stem` gives the name of an item's image, without suffix.
    """
    if part is None:
        return list(items)
    validating = held_out(map(stem, items))
    return [item for item in items if (stem(item) in validating) == (part == "val")]


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
