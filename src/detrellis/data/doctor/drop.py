"""Leaving out in memory what the doctor found:
for `train --skip-bad`, and for the clean copy that `fix` writes.

A picture of which an object is left out would teach that the object is not there. So the whole
picture goes, unless `keep_partial` says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from detrellis.data.doctor.boxes import repeated, usable
from detrellis.data.findings import RULES, Action, Finding
from detrellis.data.records import RawDataset

# The two keys in the counts that are no finding's code.
PARTIAL = "images that lost an object"
WITH_IMAGE = "boxes of dropped images"

Mask = NDArray[np.bool_]


def drop_bad(
    raw: RawDataset, findings: Iterable[Finding], keep_partial: bool = False
) -> tuple[RawDataset, dict[str, int]]:
    """`raw` without the images and boxes that `findings` name,
    and how many were left out or changed, by code.

    So are images of which a box is left out, unless `keep_partial`; copies of a box and crowd
    regions are no objects. Repeated annotation ids are renumbered, and a file listed twice is
    listed once with the boxes of both. The findings must be of this very data set: they name rows.
    """
    of_split = [f for f in findings if f.split == raw.split]
    counts = Counter[str]()
    for f in of_split:
        if RULES[f.code].action != "none":
            counts[f.code] += f.count
    # Changes: a file's records merged, ids made unique.
    raw = _merged(raw, [f for f in of_split if f.code == "duplicate-file"])
    raw = _renumbered(raw, _rows(of_split, "renumber"))
    # Records that are named.
    images, boxes = np.ones(len(raw), dtype=np.bool_), np.ones(len(raw.ids), dtype=np.bool_)
    images[_rows(of_split, "drop image")] = False
    images[_rows(of_split, "merge")] = False
    boxes[_rows(of_split, "drop box")] = False
    # Images that lost an object, and copies of boxes that came with merging.
    if not keep_partial:
        partial = images & _lost(raw, of_split)
        images &= ~partial
        counts[PARTIAL] += int(partial.sum())
    if counts["duplicate-file"]:
        copies = (repeated(raw) >= 0) & usable(raw) & boxes
        boxes &= ~copies
        counts["duplicate-box"] += int(copies.sum())
    # Boxes of images that are left out.
    of_dropped = boxes & (raw.box_rows >= 0) & ~_of(images, raw.box_rows)
    counts[WITH_IMAGE] += int(of_dropped.sum())
    return raw.take(images, boxes & ~of_dropped), {
        code: count for code, count in counts.items() if count
    }


def _rows(findings: Iterable[Finding], action: Action) -> NDArray[np.int64]:
    """The records that findings of an action name."""
    rows = [f.row for f in findings if RULES[f.code].action == action and f.row is not None]
    return np.array(rows, dtype=np.int64)


def _lost(raw: RawDataset, findings: Iterable[Finding]) -> Mask:
    """(I,) images of which an object is left out."""
    about = [
        f for f in findings if RULES[f.code].action == "drop box" and f.code != "duplicate-box"
    ]
    boxes = _rows(about, "drop box")
    owners = raw.box_rows[boxes[~raw.crowd[boxes]]]
    lost = np.zeros(len(raw), dtype=np.bool_)
    lost[owners[owners >= 0]] = True
    if files := {f.file for f in about if f.row is None}:  # lines that are no box at all
        lost |= np.array(
            [file in files for file in raw.label_files or [""] * len(raw)], dtype=np.bool_
        )
    return lost


def _of(images: Mask, rows: NDArray[np.int64]) -> Mask:
    """`images[rows]`, True for the rows -1."""
    return np.append(images, True)[rows]


def _merged(raw: RawDataset, repeated_files: list[Finding]) -> RawDataset:
    """The split with the boxes of a file's later records given to its first."""
    if not repeated_files:
        return raw
    first = np.arange(len(raw))
    first[_rows(repeated_files, "merge")] = [f.other for f in repeated_files if f.other is not None]
    known = raw.box_rows >= 0
    owners = raw.box_image_ids.copy()
    owners[known] = raw.image_ids[first[raw.box_rows[known]]]
    return replace(raw, box_image_ids=owners)


def _renumbered(raw: RawDataset, rows: NDArray[np.int64]) -> RawDataset:
    """The split with new annotation ids, above all others, in these rows."""
    ids = raw.ids.copy()
    ids[rows] = ids.max(initial=0) + 1 + np.arange(len(rows))
    return replace(raw, ids=ids)
