"""Leaving out in memory what the doctor found: for `train --skip-bad`, and for the clean copy that `fix` writes.

A picture of which an object is left out would teach that the object is not there. So the whole picture goes, unless
`keep_partial` says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from detrellis.data.doctor.boxes import repeated, usable
from detrellis.data.doctor.findings import RULES, Finding
from detrellis.data.records import RawDataset

# The two keys in the counts that are no finding's code.
PARTIAL = "images that lost an object"
WITH_IMAGE = "boxes of dropped images"

Mask = NDArray[np.bool_]


def drop_bad(
    raw: RawDataset, findings: Iterable[Finding], keep_partial: bool = False
) -> tuple[RawDataset, dict[str, int]]:
    """`raw` without the images and boxes that `findings` name, and how many were left out or changed, by code.

    So are images of which a box is left out, unless `keep_partial`; copies of a box and crowd regions are no objects.
    Repeated annotation ids are renumbered, and a file listed twice is listed once with the boxes of both. The findings
    must be of this very data set: they name rows.
    """
    mine = [f for f in findings if f.split == raw.split]
    counts = Counter[str]()
    for f in mine:
        if RULES[f.code].action != "none":
            counts[f.code] += f.count
    rows = {
        action: np.array([f.row for f in mine if RULES[f.code].action == action and f.row is not None], dtype=np.int64)
        for action in ("drop image", "drop box", "renumber")
    }
    raw = _merged(raw, [f for f in mine if f.code == "duplicate-file"])
    raw = _renumbered(raw, rows["renumber"])
    images, boxes = np.ones(len(raw), dtype=np.bool_), np.ones(len(raw.ids), dtype=np.bool_)
    images[rows["drop image"]] = False
    images[[f.row for f in mine if f.code == "duplicate-file" and f.row is not None]] = False
    boxes[rows["drop box"]] = False
    if not keep_partial:
        partial = images & _lost(raw, mine)
        images &= ~partial
        counts[PARTIAL] += int(partial.sum())
    if counts["duplicate-file"]:
        again = (repeated(raw) >= 0) & usable(raw) & boxes
        boxes &= ~again
        counts["duplicate-box"] += int(again.sum())
    homeless = boxes & (raw.box_rows >= 0) & ~_of(images, raw.box_rows)
    counts[WITH_IMAGE] += int(homeless.sum())
    return raw.take(images, boxes & ~homeless), {code: count for code, count in counts.items() if count}


def _lost(raw: RawDataset, findings: Iterable[Finding]) -> Mask:
    """(I,) images of which an object is left out."""
    about = [f for f in findings if RULES[f.code].action == "drop box" and f.code != "duplicate-box"]
    boxes = np.array([f.row for f in about if f.row is not None], dtype=np.int64)
    owners = raw.box_rows[boxes[~raw.crowd[boxes]]]
    lost = np.zeros(len(raw), dtype=np.bool_)
    lost[owners[owners >= 0]] = True
    if files := {f.file for f in about if f.row is None}:  # lines that are no box at all
        lost |= np.array([file in files for file in raw.label_files or [""] * len(raw)], dtype=np.bool_)
    return lost


def _of(images: Mask, rows: NDArray[np.int64]) -> Mask:
    """`images[rows]`, True for the rows -1."""
    return np.append(images, True)[rows]


def _merged(raw: RawDataset, twice: list[Finding]) -> RawDataset:
    """Boxes of a file's later records given to its first."""
    if not twice:
        return raw
    first = np.arange(len(raw))
    first[[f.row for f in twice if f.row is not None]] = [f.other for f in twice if f.other is not None]
    known = raw.box_rows >= 0
    owners = raw.box_image_ids.copy()
    owners[known] = raw.image_ids[first[raw.box_rows[known]]]
    return replace(raw, box_image_ids=owners)


def _renumbered(raw: RawDataset, rows: NDArray[np.int64]) -> RawDataset:
    """New annotation ids, above all others, for the rows."""
    ids = raw.ids.copy()
    ids[rows] = ids.max(initial=0) + 1 + np.arange(len(rows))
    return replace(raw, ids=ids)
