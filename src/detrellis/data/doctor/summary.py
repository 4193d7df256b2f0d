"""What is in a split, in numbers: the head of the doctor's report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detrellis.data.records import RawDataset

SMALL, MEDIUM = 32**2, 96**2  # COCO's bounds, in square pixels


@dataclass(frozen=True)
class ClassCount:
    """How often one class occurs."""

    id: int
    name: str
    boxes: int
    images: int


@dataclass(frozen=True)
class SplitSummary:
    """One split."""

    split: str
    source: str
    images: int
    images_without_boxes: int
    boxes: int
    crowd: int
    most_boxes: int  # in one image
    box_sizes: tuple[int, int, int]  # small, medium, large, as COCO has them
    image_sizes: tuple[tuple[int, int], ...]  # smallest, median and largest (width, height), by area
    classes: tuple[ClassCount, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def summarise(raws: Mapping[str, RawDataset]) -> tuple[SplitSummary, ...]:
    """The numbers of each split."""
    return tuple(_summary(raw) for raw in raws.values())


def _summary(raw: RawDataset) -> SplitSummary:
    owned = raw.box_rows[raw.box_rows >= 0]
    per_image = np.bincount(owned, minlength=len(raw))
    areas = np.nan_to_num(raw.boxes[:, 2] * raw.boxes[:, 3])
    small, medium = int((areas < SMALL).sum()), int(((areas >= SMALL) & (areas < MEDIUM)).sum())
    return SplitSummary(
        split=raw.split,
        source=str(raw.source),
        images=len(raw),
        images_without_boxes=int((per_image == 0).sum()),
        boxes=len(raw.ids),
        crowd=int(raw.crowd.sum()),
        most_boxes=int(per_image.max(initial=0)),
        box_sizes=(small, medium, len(raw.ids) - small - medium),
        image_sizes=_image_sizes(raw),
        classes=_classes(raw),
    )


def _image_sizes(raw: RawDataset) -> tuple[tuple[int, int], ...]:
    sizes = raw.sizes[(raw.sizes > 0).all(axis=1)]
    if not len(sizes):
        return ()
    order = np.argsort(sizes.prod(axis=1), kind="stable")
    places = (order[0], order[len(order) // 2], order[-1])
    return tuple((int(sizes[p, 1]), int(sizes[p, 0])) for p in places)


def _classes(raw: RawDataset) -> tuple[ClassCount, ...]:
    boxes = dict(zip(*(a.tolist() for a in np.unique(raw.box_categories, return_counts=True)), strict=True))
    pairs = np.unique(np.stack([raw.box_categories, raw.box_image_ids], axis=1), axis=0)[:, 0]
    images = dict(zip(*(a.tolist() for a in np.unique(pairs, return_counts=True)), strict=True))
    return tuple(ClassCount(i, name, boxes.get(i, 0), images.get(i, 0)) for i, name in raw.categories)
