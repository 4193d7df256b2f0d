"""The evaluators that compute COCO's statistics:
hotcoco, or pycocotools where it cannot be imported.

hotcoco (Rust) takes about 1 s where pycocotools needs minutes, with the same twelve numbers.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detrellis.errors import UserError

logger = logging.getLogger(__name__)

Float = NDArray[np.float64]
Int = NDArray[np.int64]


Masks = Sequence[dict[str, Any]]  # COCO's compressed run lengths: size (height, width), counts


class ClassLists(NamedTuple):
    """LVIS's: what was looked for in each image, and how frequent each class is."""

    # Of each image, in the order of `images`, classes that it lacks
    absent: Sequence[Sequence[int]]
    not_exhaustive: Sequence[Sequence[int]]  # classes of which not all objects are marked
    frequency: Sequence[str]  # (C,) r, c or f


class Truth(NamedTuple):
    """Ground truth as the evaluators take it; images and classes are numbered from 1."""

    images: Int  # (S,)
    classes: int
    image: Int  # (T,)
    category: Int  # (T,)
    boxes: Float  # (T, 4) x, y, width, height
    areas: Float  # (T,)
    crowd: NDArray[np.bool_]  # (T,)
    masks: Masks | None = None  # of each; None: boxes are evaluated
    lists: ClassLists | None = None  # of LVIS


# From ground truth, detections and their masks, where there are those of the truth: the statistics
# (12,); precision (IoU, recall, class) over all areas with 100 detections; and the evaluation
# itself.
Evaluator = Callable[[Truth, Float, Masks | None], tuple[Float, Float, Any]]


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
        raise UserError(
            f"COCO evaluation needs hotcoco, which cannot be imported: {reason}", remedy
        ) from None
    logger.warning(
        "hotcoco cannot be imported (%s): evaluating with pycocotools, which is about 100 times "
        "slower",
        reason,
    )
    return _pycocotools


def _hotcoco(truth: Truth, rows: Float, masks: Masks | None) -> tuple[Float, Float, Any]:
    """An `Evaluator`: hotcoco."""
    from hotcoco import COCO, COCOeval

    t = truth
    images, categories = _numbered(t)
    ids = np.arange(1, len(t.image) + 1)
    columns = (images, categories, t.image, t.category, t.boxes)
    if t.masks is None or masks is None:
        gt = COCO.from_arrays(*columns, ids=ids, area=t.areas, iscrowd=t.crowd)
        evaluation = COCOeval(gt, gt.load_res(rows), "bbox")
    else:
        gt = COCO.from_arrays(
            *columns, ids=ids, area=t.areas, iscrowd=t.crowd, segmentation=list(t.masks)
        )
        evaluation = COCOeval(gt, gt.load_res(results_of(rows, masks)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # fills `stats` without printing
    assert evaluation.eval is not None
    return np.asarray(evaluation.stats), evaluation.eval["precision"][..., 0, -1], evaluation


def results_of(rows: Float, masks: Masks) -> list[dict[str, Any]]:
    """Detections without their boxes, so that a mask's area is the detection's."""
    columns = zip(
        rows[:, 0].astype(int).tolist(),
        rows[:, 6].astype(int).tolist(),
        rows[:, 5].tolist(),
        strict=True,
    )
    return [
        {"image_id": image, "category_id": category, "score": score, "segmentation": mask}
        for (image, category, score), mask in zip(columns, masks, strict=True)
    ]


def _pycocotools(truth: Truth, rows: Float, masks: Masks | None) -> tuple[Float, Float, Any]:
    """An `Evaluator`: pycocotools."""
    from pycocotools import mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    t, f = truth, rows
    images, categories = _numbered(t)
    areas = f[:, 3] * f[:, 4] if masks is None else np.array([float(mask.area(m)) for m in masks])
    # Not through loadRes: it fails when there is no detection at all.
    gt_columns = (t.image, t.category, t.boxes, t.areas, t.crowd, np.zeros(len(t.image)))
    dt_columns = (f[:, 0], f[:, 6], f[:, 1:5], areas, np.zeros(len(f), dtype=np.bool_), f[:, 5])
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for columns, drawn in ((gt_columns, t.masks), (dt_columns, masks)):
            side, annotations = COCO(), _dicts(*columns)
            if drawn is not None:
                annotations = [
                    row | {"segmentation": m} for row, m in zip(annotations, drawn, strict=True)
                ]
            side.dataset = {"images": images, "categories": categories, "annotations": annotations}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "bbox" if masks is None else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats), evaluation.eval["precision"][..., 0, -1], evaluation


def _numbered(truth: Truth) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    images: list[dict[str, Any]] = [
        {"id": i, "width": 0, "height": 0} for i in truth.images.tolist()
    ]
    if truth.masks is not None:  # pycocotools asks the images
        sizes = dict(zip(truth.image.tolist(), (mask["size"] for mask in truth.masks), strict=True))
        images = [
            {"id": i, "height": h, "width": w}
            for i in truth.images.tolist()
            for h, w in [sizes.get(i, (0, 0))]
        ]
    return images, [{"id": k + 1, "name": str(k)} for k in range(truth.classes)]


def _dicts(
    image: Any, category: Any, boxes: Float, areas: Float, crowd: Any, scores: Float
) -> list[dict[str, Any]]:
    names = ("image_id", "category_id", "bbox", "area", "iscrowd", "score")
    columns = (image.astype(int), category.astype(int), boxes, areas, crowd.astype(int), scores)
    rows = zip(*(c.tolist() for c in columns), strict=True)
    return [dict(zip(names, row, strict=True)) | {"id": n} for n, row in enumerate(rows, start=1)]
