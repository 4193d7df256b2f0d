"""How many images, boxes and classes a split has: the head of the doctor's report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

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
    """Counts of the images, boxes and classes of one split."""

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


def summarise(raws: Mapping[str, RawDataset]) -> tuple[SplitSummary, ...]:
    """The summary of each split, in the order of `raws`."""
    return tuple(_summary(raw) for raw in raws.values())


def _summary(raw: RawDataset) -> SplitSummary:
    per_image = np.bincount(raw.box_rows[raw.box_rows >= 0], minlength=len(raw))
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
    boxes = Counter(raw.box_categories.tolist())
    pairs = np.unique(np.stack([raw.box_categories, raw.box_image_ids], axis=1), axis=0)
    images = Counter(pairs[:, 0].tolist())  # each image once for each of its categories
    return tuple(ClassCount(i, name, boxes[i], images[i]) for i, name in raw.categories)
