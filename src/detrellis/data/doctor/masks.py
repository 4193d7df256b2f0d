"""The doctor checks the outlines of one split, where it has any;
for boxes alone nothing here matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrellis.data.doctor.boxes import ROUNDING, frames, usable
from detrellis.data.findings import Finding, finding
from detrellis.data.formats.segmentation import box_of, drawn, packed
from detrellis.data.formats.yolo_labels import crosses_itself
from detrellis.data.records import RawDataset
from detrellis.errors import UserError
from detrellis.rle import area

AGREEING = 0.8  # IoU of a box and the one around its mask,
NEAR = 2.0  # or pixels by which their sides differ
LONGEST = 2000  # corners of a polygon whose sides are compared


def check_masks(raw: RawDataset) -> list[Finding]:
    """Outlines that are missing, damaged, empty, outside their image, or not in their box;
    and that cross themselves.

    A finding stands for all objects of one kind, and names the first.
    """
    if raw.segmentations is None or not len(raw.ids):
        return []
    try:
        values = raw.segmentations(raw.box_image_ids.tolist(), raw.lines.tolist())
    except UserError:  # what cannot be read was said before
        return []
    if not any(values):
        return []
    sizes, known = frames(raw)
    checked = np.flatnonzero(known & ~raw.crowd).tolist()
    kinds: dict[str, list[tuple[int, str]]] = {}
    boxes = np.where(usable(raw)[:, None], raw.boxes, np.nan)
    for box in checked:
        for code, what in _problems(values[box], sizes[box].tolist(), boxes[box]):
            kinds.setdefault(code, []).append((box, what))
    return list(_together(raw, kinds, len(checked)))


def _together(
    raw: RawDataset, kinds: Mapping[str, Sequence[tuple[int, str]]], objects: int
) -> Iterator[Finding]:
    for code, objects_of_kind in kinds.items():
        box, what = objects_of_kind[0]
        file, line = raw.place(box)
        text = (
            f"{len(objects_of_kind)} of {objects} objects: {what}, the first in "
            f"{raw.file_names[raw.box_rows[box]]}"
        )
        yield finding(
            code, raw.split, file, text, id=raw.box_id(box), line=line, count=len(objects_of_kind)
        )


def _problems(value: Any, size: list[int], box: NDArray[np.float64]) -> Iterator[tuple[str, str]]:
    """Code and words of what is wrong with an outline in an image of `size` (height, width)."""
    if not value:
        yield "missing-mask", "no mask, and others have one"
        return
    if isinstance(value, dict) and value.get("size") not in (size, tuple(size)):
        yield (
            "mask-size",
            f"run lengths of the size {value.get('size')} (height, width) in an image of {size}",
        )
        return
    runs = drawn(value, size)
    if runs is None or area(runs, (size[0], size[1])) == 0:
        damaged = not packed(value, size) and not isinstance(value, list)
        yield (
            "empty-mask",
            "a mask that cannot be read" if damaged else "a mask without a pixel in its image",
        )
        return
    if isinstance(value, list):
        yield from _polygon_problems([np.asarray(part, dtype=np.float64) for part in value], size)
    around = box_of(value)
    if around is not None and np.isfinite(box).all() and not _agree(box, np.array(around)):
        yield "mask-box", f"a box {_numbers(box)} whose mask fills {_numbers(np.array(around))}"


def _polygon_problems(
    parts: Sequence[NDArray[np.float64]], size: list[int]
) -> Iterator[tuple[str, str]]:
    points = np.concatenate([part.reshape(-1, 2) for part in parts])
    beyond = max(float((-points).max()), float((points - size[::-1]).max()))
    if beyond > ROUNDING:
        yield "mask-outside", f"a polygon that reaches {beyond:.4g} pixels beyond its image"
    if any(8 <= len(part) <= LONGEST and crosses_itself(part) for part in parts):
        yield "crossing-mask", "a polygon that crosses itself"


def _agree(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether two boxes (x, y, width, height) are the same but for rounding."""
    a, b = (np.concatenate([box[:2], box[:2] + box[2:]]) for box in (one, other))
    if np.abs(a - b).max() <= NEAR:
        return True
    sides = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(min=0)
    shared = sides.prod()
    return bool(shared / (one[2:].prod() + other[2:].prod() - shared) >= AGREEING)


def _numbers(box: NDArray[np.float64]) -> str:
    return f"[{', '.join(f'{value:.6g}' for value in box)}]"
