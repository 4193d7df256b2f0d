"""The doctor asks whether a detector has queries enough for the fullest image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.records import RawDataset


class Capacity(NamedTuple):
    """How many objects of an image a detector can learn and find."""

    queries: int  # each finds one object at most
    detections: int  # that it returns of an image at most
    each: int = 1  # queries that training gives every object (Align-DETR's candidates)
    patterns: int = 1  # queries for each one of `detector.query_count`


def check_queries(raws: Mapping[str, RawDataset], capacity: Capacity) -> list[Finding]:
    """Splits with images of more objects than the detector has queries for, or than it returns."""
    return [f for raw in raws.values() if len(raw) for f in _too_full(raw, capacity)]


def _too_full(raw: RawDataset, capacity: Capacity) -> Iterator[Finding]:
    objects = np.bincount(raw.box_rows[(raw.box_rows >= 0) & ~raw.crowd], minlength=len(raw))
    most, row = int(objects.max()), int(objects.argmax())
    enough = f"-o detector.top_k={_rounded(most)}"
    if most * capacity.each > capacity.queries:
        needed = -(-most * capacity.each // capacity.patterns)
        enough = f"-o detector.query_count={_rounded(needed)}" + (f" {enough}" if most > capacity.detections else "")
        each = f", and training gives {capacity.each} to each object" if capacity.each > 1 else ""
        what = f"{most:,} objects, but the detector has {capacity.queries:,} queries{each}"
        full = int((objects * capacity.each > capacity.queries).sum())
    elif most > capacity.detections:
        what = f"{most:,} objects, but the detector returns {capacity.detections:,} of an image (`detector.top_k`)"
        full = int((objects > capacity.detections).sum())
    else:
        return
    what = f"{what}: the others cannot be found; {enough} would do"  # here, because `train` prints no remedies
    yield finding("too-many-objects", raw.split, raw.path(row), what, id=raw.image_id(row), count=full)


def _rounded(number: int) -> int:
    """Up to a full hundred."""
    return -(-number // 100) * 100
