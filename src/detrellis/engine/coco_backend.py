"""The evaluators that compute COCO's statistics: hotcoco, or pycocotools where it cannot be imported.

hotcoco (Rust) takes about 1 s where pycocotools needs minutes, with the same twelve numbers.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detrellis.errors import UserError

logger = logging.getLogger(__name__)

Float = NDArray[np.float64]
Int = NDArray[np.int64]


class Truth(NamedTuple):
    """Ground truth as the evaluators take it; images and classes are numbered from 1."""

    images: Int  # (S,)
    classes: int
    image: Int  # (T,)
    category: Int  # (T,)
    boxes: Float  # (T, 4) x, y, width, height
    areas: Float  # (T,)
    crowd: NDArray[np.bool_]  # (T,)


# From ground truth and detections: the statistics (12,); precision (IoU, recall, class) over all areas with 100
# detections; and the evaluation itself.
Evaluator = Callable[[Truth, Float], tuple[Float, Float, Any]]


@functools.cache
def backend() -> Evaluator:
    """The evaluator that can be imported; the slow one is announced once."""
    try:
        from hotcoco import COCO

        _ = COCO.from_arrays  # releases before 1.3 lack it
        return _hotcoco
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error)
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        remedy = "Install it with `pip install -U hotcoco` (or, slower, `pip install pycocotools`)."
        raise UserError(f"COCO evaluation needs hotcoco, which cannot be imported: {reason}", remedy) from None
    logger.warning(
        "hotcoco cannot be imported (%s): evaluating with pycocotools, which is about 100 times slower", reason
    )
    return _pycocotools


def _hotcoco(truth: Truth, rows: Float) -> tuple[Float, Float, Any]:
    """An `Evaluator`: hotcoco."""
    from hotcoco import COCO, COCOeval

    t = truth
    images, categories = _numbered(t)
    ids = np.arange(1, len(t.image) + 1)
    gt = COCO.from_arrays(images, categories, t.image, t.category, t.boxes, ids=ids, area=t.areas, iscrowd=t.crowd)
    evaluation = COCOeval(gt, gt.load_res(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # fills `stats` without printing
    assert evaluation.eval is not None
    return np.asarray(evaluation.stats), evaluation.eval["precision"][..., 0, -1], evaluation


def _pycocotools(truth: Truth, rows: Float) -> tuple[Float, Float, Any]:
    """An `Evaluator`: pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    t, f = truth, rows
    images, categories = _numbered(t)
    # Not through loadRes: it fails when there is no detection at all.
    gt_columns = (t.image, t.category, t.boxes, t.areas, t.crowd, np.zeros(len(t.image)))
    dt_columns = (f[:, 0], f[:, 6], f[:, 1:5], f[:, 3] * f[:, 4], np.zeros(len(f), dtype=np.bool_), f[:, 5])
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for columns in (gt_columns, dt_columns):
            side = COCO()
            side.dataset = {"images": images, "categories": categories, "annotations": _dicts(*columns)}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats), evaluation.eval["precision"][..., 0, -1], evaluation


def _numbered(truth: Truth) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    images = [{"id": i, "width": 0, "height": 0} for i in truth.images.tolist()]
    return images, [{"id": k + 1, "name": str(k)} for k in range(truth.classes)]


def _dicts(image: Any, category: Any, boxes: Float, areas: Float, crowd: Any, scores: Float) -> list[dict[str, Any]]:
    names = ("image_id", "category_id", "bbox", "area", "iscrowd", "score")
    columns = (image.astype(int), category.astype(int), boxes, areas, crowd.astype(int), scores)
    rows = zip(*(c.tolist() for c in columns), strict=True)
    return [dict(zip(names, row, strict=True)) | {"id": n} for n, row in enumerate(rows, start=1)]
