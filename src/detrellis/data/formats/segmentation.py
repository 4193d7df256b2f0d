"""COCO's `segmentation` of one object: polygons of its parts, or run lengths, compressed or not.

hotcoco reads the run lengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from detrellis.rle import Bitmap, Size, encode


def packed(value: Any, size: list[int]) -> list[bytes]:
    """The parts of a `segmentation` in an image of `size` (height, width);
    none where it is damaged.

    Polygons are float32 (x1, y1, x2, ...) in pixels; those of less than three points outline
    nothing and are left out. Run lengths are one part, compressed.
    """
    try:
        if isinstance(value, dict):
            return [_run_lengths(value, size)]
        return [part.tobytes() for part in _polygons(value, np.float32) if part.size >= 6]
    except (TypeError, ValueError, KeyError, OverflowError):
        return []


def drawn(value: Any, size: list[int]) -> bytes | None:
    """The run lengths of a `segmentation` in an image of `size`, as pycocotools draws it;
    None where it is damaged.
    """
    from hotcoco import mask

    try:
        if isinstance(value, dict):
            return _run_lengths(value, size)
        polygons = [part.tolist() for part in _polygons(value, np.float64) if part.size >= 6]
        parts = mask.frPyObjects(polygons, *size) if polygons else []
        return mask.merge(parts)["counts"] if parts else None
    except (TypeError, ValueError, KeyError, OverflowError):
        return None


def box_of(value: Any) -> list[float] | None:
    """(x, y, width, height) around a `segmentation`;
    None where it outlines nothing or is damaged.
    """
    try:
        if isinstance(value, dict):
            box = _box_of_run_lengths(value)
        else:
            # One polygon, not in a list
            flat = isinstance(value, list) and value and not isinstance(value[0], list)
            polygons = _polygons([value] if flat else value, np.float64)
            points = np.concatenate([polygon.reshape(-1, 2) for polygon in polygons])
            box = [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]
    except (TypeError, ValueError, KeyError, OverflowError):
        return None
    return box if min(box[2:]) > 0 else None


def run_lengths_of(bitmap: Bitmap) -> dict[str, Any]:
    """The `segmentation` of a bitmap."""
    return {"size": [*bitmap.shape], "counts": encode(bitmap).decode()}


def united(one: Any, other: Any, size: Size) -> Any:
    """The `segmentation` of two parts of an object in an image of `size`:
    polygons where both are.
    """
    from hotcoco import mask

    if not isinstance(one, dict) and not isinstance(other, dict):
        return [*one, *other]
    runs = [run for value in (one, other) if (run := drawn(value, [*size])) is not None]
    merged = mask.merge([{"size": [*size], "counts": run} for run in runs])
    return {"size": [*size], "counts": merged["counts"].decode()}


def _polygons(value: Any, dtype: type[np.floating[Any]]) -> list[Any]:
    parts = [np.array(part, dtype=dtype) for part in value]
    if not all(part.ndim == 1 and part.size % 2 == 0 and np.isfinite(part).all() for part in parts):
        raise ValueError("no list of points")
    return parts


def _run_lengths(value: dict[str, Any], size: list[int]) -> bytes:
    """Compressed, whether they were or not. hotcoco raises where they are damaged."""
    from hotcoco import mask

    if value["size"] != size:
        raise ValueError("of another image")
    counts: bytes = mask.frPyObjects(value, *size)["counts"]
    return counts


def _box_of_run_lengths(value: dict[str, Any]) -> list[float]:
    from hotcoco import mask

    height, width = value["size"]
    box: list[float] = np.asarray(mask.toBbox(mask.frPyObjects(value, height, width))).tolist()
    return box
