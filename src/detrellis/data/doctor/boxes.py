"""The doctor checks the boxes of one split, in array operations, so that Python sees only what is
wrong; and whether a detector has queries enough for the image with most of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detrellis.data.findings import Finding, finding
from detrellis.data.records import RawDataset, clip

ROUNDING = 1.0  # pixels beyond the frame that tools and resizing commonly leave
Mask = NDArray[np.bool_]


def check_boxes(raw: RawDataset) -> list[Finding]:
    """Everything about ids, image and category references, and boxes."""
    if not len(raw.ids):
        return []
    return [*_references(raw), *_geometry(raw), *_conventions(raw), *_copies(raw), *_areas(raw)]


def _rows(mask: Mask) -> list[int]:
    return [int(row) for row in np.flatnonzero(mask)]


def _at(raw: RawDataset, code: str, box: int, what: str) -> Finding:
    file, line = raw.place(box)
    return finding(code, raw.split, file, what, id=raw.box_id(box), line=line, row=box)


def _named(raw: RawDataset, box: int) -> str:
    """`[10, 20, -5, 7] in cat.jpg`."""
    numbers = ", ".join(f"{value:.6g}" for value in raw.boxes[box])
    row = int(raw.box_rows[box])
    return f"[{numbers}]{f' in {raw.file_names[row]}' if row >= 0 else ''}"


def _references(raw: RawDataset) -> Iterator[Finding]:
    listed = {i for i, _ in raw.categories}
    for box in _rows(raw.box_rows < 0):
        yield _at(
            raw,
            "unknown-image",
            box,
            f"image_id {raw.box_image_ids[box]} is not in the list of images",
        )
    for box in _rows(~np.isin(raw.box_categories, list(listed))):
        what = f"category {raw.box_categories[box]} is not in the list of categories"
        yield _at(raw, "unknown-category", box, what)
    _, first, counts = np.unique(raw.ids, return_index=True, return_counts=True)
    if len(first) < len(raw.ids):
        times = dict(zip(raw.ids[first].tolist(), counts.tolist(), strict=True))
        repeated_id = np.ones(len(raw.ids), dtype=np.bool_)
        repeated_id[first] = False
        for box in _rows(repeated_id):
            box_id = int(raw.ids[box])
            yield _at(
                raw,
                "duplicate-annotation-id",
                box,
                f"annotation id {box_id} is used {times[box_id]} times",
            )


def frames(raw: RawDataset) -> tuple[NDArray[np.int64], Mask]:
    """`(T, 2)` height and width of each box's image in pixels,
    and `(T,)` whether they are known.
    """
    if not len(raw):
        return np.zeros((len(raw.ids), 2), dtype=np.int64), np.zeros(len(raw.ids), dtype=np.bool_)
    sizes = raw.sizes[raw.box_rows]
    return sizes, (raw.box_rows >= 0) & _all(sizes > 0)


def usable(raw: RawDataset) -> Mask:
    """`(T,)` whether a box has four finite numbers, and some width and height."""
    return _all(np.isfinite(raw.boxes)) & _all(np.nan_to_num(raw.boxes[:, 2:]) > 0)


def _all(table: Mask) -> Mask:
    every: Mask = np.logical_and.reduce(table, axis=1)
    return every


def _geometry(raw: RawDataset) -> Iterator[Finding]:
    # Boxes that are none.
    finite = _all(np.isfinite(raw.boxes))
    fine = usable(raw)
    for box in _rows(~finite):
        what = f"the box {_named(raw, box)} is missing or not four finite numbers"
        if box in raw.written:
            what = f"no four finite numbers for a box, but {raw.written[box]}"
        yield _at(raw, "bad-box", box, what)
    for box in _rows(finite & ~fine):
        yield _at(raw, "empty-box", box, f"the box {_named(raw, box)} has no width or no height")
    # Boxes that leave their image: altogether, by more than rounding, by rounding.
    sizes, known = frames(raw)
    boxes = np.where(fine[:, None], raw.boxes, 0)
    outside = fine & known & (clip(boxes, sizes)[:, 2:] <= 0).any(axis=1)
    beyond = np.where(fine & known & ~outside, _beyond(boxes, sizes), 0)
    corners = _fits_as_corners(boxes, sizes)
    for box in _rows(outside):
        what = f"the box {_named(raw, box)} lies outside the image ({_size(sizes[box])})"
        yield _at(raw, "outside-box", box, what + _hint(corners[box]))
    for box in _rows(beyond > ROUNDING):
        what = (
            f"the box {_named(raw, box)} reaches {beyond[box]:.4g} pixels beyond the image "
            f"({_size(sizes[box])})"
        )
        yield _at(raw, "clipped-box", box, what + _hint(corners[box]))
    if rounded := _rows((beyond > 0) & (beyond <= ROUNDING)):
        what = f"{len(rounded)} boxes reach up to {ROUNDING:g} pixel beyond their images"
        yield finding(
            "clipped-rounding", raw.split, raw.place(rounded[0])[0], what, count=len(rounded)
        )


def _beyond(boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """`(T,)` pixels by which a box leaves its frame, on the side where that is farthest;
    0 inside.
    """
    far = boxes[:, :2] + boxes[:, 2:] - sizes[:, ::-1]
    worst: NDArray[np.float64] = np.maximum(far, -boxes[:, :2]).max(axis=1)
    return np.maximum(worst, 0)


def _fits_as_corners(boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> Mask:
    """`(T,)` whether the four numbers, taken for two corners, are a box inside the image."""
    ordered = _all(boxes[:, 2:] > boxes[:, :2])
    inside = _all(boxes[:, 2:] <= sizes[:, ::-1] + ROUNDING) & _all(boxes[:, :2] >= -ROUNDING)
    return ordered & inside


def _hint(corners: np.bool_) -> str:
    return "; as two corners it would fit" if corners else ""


def _size(size: NDArray[np.int64]) -> str:
    return f"{size[1]}x{size[0]}"


def _conventions(raw: RawDataset) -> Iterator[Finding]:
    """Boxes in another convention than the file's:
    a guess, so a warning about all of them together.
    """
    sizes, known = frames(raw)
    fine = usable(raw) & known & ~raw.crowd
    boxes, sizes = raw.boxes[fine], sizes[fine]
    if not len(boxes):
        return
    places = np.flatnonzero(fine)
    # A box within the first pixel of a larger image is no object.
    relative = (
        _all(boxes >= 0) & _all(boxes[:, :2] + boxes[:, 2:] <= 1.001) & (sizes.min(axis=1) > 8)
    )
    if relative.any():
        what = (
            f"{relative.sum()} of {len(raw.ids)} boxes lie between 0 and 1: they look like "
            "shares of the image"
        )
        yield _together(raw, "normalised-boxes", places[relative], what)
    # Real (x, y, w, h) boxes end inside the frame; of corners taken for such, those right of the
    # middle do not.
    leaving = _beyond(boxes, sizes) > ROUNDING
    corners = _fits_as_corners(boxes, sizes)
    if leaving.mean() >= 0.1 and corners.mean() >= 0.95:
        what = (
            f"{leaving.sum()} of {len(raw.ids)} boxes leave their images, but nearly all fit as "
            "(x1, y1, x2, y2)"
        )
        yield _together(raw, "xyxy-boxes", places[leaving], what)


def _together(raw: RawDataset, code: str, boxes: NDArray[np.int64], what: str) -> Finding:
    first = int(boxes[0])
    file, line = raw.place(first)
    what = f"{what}; the first: {_named(raw, first)}"
    return finding(code, raw.split, file, what, id=raw.box_id(first), line=line, count=len(boxes))


def repeated(raw: RawDataset) -> NDArray[np.int64]:
    """`(T,)` for each box the index of the first one with the same image,
    category and numbers, or -1.
    """
    columns = np.column_stack(
        # Bits: NaN equals itself
        [raw.box_image_ids, raw.box_categories, raw.crowd, raw.boxes.view(np.int64)]
    )
    # A random sum sorts ten times faster than seven columns; boxes of the same sum are compared in
    # full.
    weights = np.random.default_rng(0).integers(1, 2**62, size=columns.shape[1], dtype=np.int64)
    with np.errstate(over="ignore"):
        keys = (columns * weights).sum(axis=1)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    # Of each run of equal sums, the first is the original of the others.
    follows = np.concatenate([[False], ordered[1:] == ordered[:-1]])
    run_start = np.maximum.accumulate(np.where(follows, 0, np.arange(len(keys))))
    candidates, originals = order[follows], order[run_start[follows]]
    same = (columns[candidates] == columns[originals]).all(axis=1)
    first = np.full(len(keys), -1, dtype=np.int64)
    first[candidates[same]] = originals[same]
    return first


def _copies(raw: RawDataset) -> Iterator[Finding]:
    first = repeated(raw)
    for box in _rows((first >= 0) & usable(raw)):
        original = int(first[box])
        _, line = raw.place(original)
        where = f"annotation {raw.ids[original]}" if line is None else f"number {line}"
        yield _at(raw, "duplicate-box", box, f"the box {_named(raw, box)} is the same as {where}")


def _areas(raw: RawDataset) -> Iterator[Finding]:
    missing = int(np.isnan(raw.areas).sum())
    if missing and raw.label_files is None:
        what = f"{missing} of {len(raw.ids)} annotations have no positive `area`"
        yield finding("missing-area", raw.split, raw.source, what, count=missing)


class Capacity(NamedTuple):
    """How many objects of an image a detector can learn and find."""

    queries: int  # each finds one object at most
    detections: int  # that it returns of an image at most
    each: int = 1  # queries that training gives every object (Align-DETR's candidates)
    patterns: int = 1  # queries for each one of `detector.queries.count`


def check_queries(raw: RawDataset, capacity: Capacity) -> Iterator[Finding]:
    """Whether a split has images of more objects than the detector has queries for,
    or than it returns.
    """
    if not len(raw):
        return
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
        what = (
            f"{largest:,} objects, but the detector returns {capacity.detections:,} of an image "
            "(`detector.top_k`)"
        )
        images = int((objects > capacity.detections).sum())
    else:
        return
    # The remedy stands here, because `train` prints no remedies.
    what = f"{what}: the others cannot be found; {' '.join(options)} would do"
    yield finding(
        "too-many-objects", raw.split, raw.path(row), what, id=raw.image_id(row), count=images
    )


def _rounded(number: int) -> int:
    """The number, rounded up to a full hundred."""
    return -(-number // 100) * 100
