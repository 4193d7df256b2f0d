"""The doctor checks whether a detector has queries enough for the image with most objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from detrellis.data.findings import Finding, finding
from detrellis.data.records import RawDataset


class Capacity(NamedTuple):
    """How many objects of an image a detector can learn and find."""

    queries: int  # each finds one object at most
    detections: int  # that it returns of an image at most
    each: int = 1  # queries that training gives every object (Align-DETR's candidates)
    patterns: int = 1  # queries for each one of `detector.queries.count`


def check_queries(raws: Mapping[str, RawDataset], capacity: Capacity) -> list[Finding]:
    """Splits with images of more objects than the detector has queries for, or than it returns."""
    return [f for raw in raws.values() if len(raw) for f in _too_full(raw, capacity)]


def _too_full(raw: RawDataset, capacity: Capacity) -> Iterator[Finding]:
    objects = np.bincount(raw.box_rows[(raw.box_rows >= 0) & ~raw.crowd], minlength=len(raw))
    largest, row = int(objects.max()), int(objects.argmax())
    options = [f"-o detector.top_k={_rounded(largest)}"] if largest > capacity.detections else []
    if largest * capacity.each > capacity.queries:
        needed = -(-largest * capacity.each // capacity.patterns)
        options.insert(0, f"-o detector.queries.count={_rounded(needed)}")
        each = f", and training gives {capacity.each} to each object" if capacity.each > 1 else ""
        what = f"{largest:,} objects, but the detector has {capacity.queries:,} queries{each}"
        images = int((objects * capacity.each > capacity.queries).sum())
    elif options:
        what = f"{largest:,} objects, but the detector returns {capacity.detections:,} of an image (`detector.top_k`)"
        images = int((objects > capacity.detections).sum())
    else:
        return
    # The remedy stands here, because `train` prints no remedies.
    what = f"{what}: the others cannot be found; {' '.join(options)} would do"
    yield finding("too-many-objects", raw.split, raw.path(row), what, id=raw.image_id(row), count=images)


def _rounded(number: int) -> int:
    """The number, rounded up to a full hundred."""
    return -(-number // 100) * 100
