"""LVIS's AP (Gupta et al., 2019), by hotcoco's LVIS mode.

Detections of classes that nobody looked for in an image do not count, and unmatched ones of classes
of which not all objects are marked do neither. APr, APc and APf are the means over rare, common and
frequent classes. The best 300 detections of an image count (AP), or the best 1000 (AP@1000), as the
released Co-DETR evaluates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from detrellis.data.annotations import Federation
from detrellis.engine.coco_backend import ClassLists, Float, Int, Masks, Truth, results_of
from detrellis.errors import UserError

LIMITS = (300, 1000)  # detections of an image
# Beside the AP that COCO has too
NAMES = ("APr", "APc", "APf", "AR@300", "ARs@300", "ARm@300", "ARl@300")


def class_lists(
    federation: Federation, image_ids: Int, category_ids: tuple[int, ...]
) -> ClassLists:
    """The lists of the images `image_ids (S,)`,
    with classes numbered from 1 in the order of `category_ids`.
    """
    place = {category: k + 1 for k, category in enumerate(category_ids)}
    row = {image: i for i, image in enumerate(image_ids.tolist())}

    def listed(pairs: Int) -> list[list[int]]:
        lists: list[list[int]] = [[] for _ in row]
        for image, category in pairs.tolist():
            if image in row and category in place:
                lists[row[image]].append(place[category])
        return lists

    letters = [federation.frequency.get(category, "") for category in category_ids]
    return ClassLists(listed(federation.absent), listed(federation.not_exhaustive), letters)


def lvis_scores(
    truth: Truth, rows: Float, masks: Masks | None, limit: int
) -> tuple[Mapping[str, float], Float]:
    """The statistics with the best `limit` detections of each image,
    and precision (IoU, recall, class).

    `rows (N, 7)` as `Evaluator` takes them. Raises `UserError` where hotcoco cannot be imported.
    """
    try:
        from hotcoco import COCO, LVISEval, LVISResults
    except ImportError as error:
        raise UserError(
            f"LVIS evaluation needs hotcoco: {error}", "Install it: `pip install -U hotcoco`."
        ) from None
    assert truth.lists is not None
    t, lists = truth, truth.lists
    images: list[dict[str, Any]] = [
        {
            "id": i,
            "width": 0,
            "height": 0,
            "neg_category_ids": absent,
            "not_exhaustive_category_ids": partial,
        }
        for i, absent, partial in zip(
            t.images.tolist(), lists.absent, lists.not_exhaustive, strict=True
        )
    ]
    categories = [
        {"id": k + 1, "name": str(k), "frequency": letter}
        for k, letter in enumerate(lists.frequency)
    ]
    if not len(rows):
        return {}, np.full((10, 101, t.classes), -1.0)
    outlines: Any = {} if t.masks is None else {"segmentation": list(t.masks)}
    ids = np.arange(1, len(t.image) + 1)
    gt = COCO.from_arrays(
        images, categories, t.image, t.category, t.boxes, ids=ids, area=t.areas, **outlines
    )
    detected = LVISResults(gt, rows if masks is None else results_of(rows, masks), max_dets=limit)
    evaluation = LVISEval(gt, detected, "bbox" if masks is None else "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    assert evaluation.eval is not None
    evaluation.summary_lines()  # fills the results without printing
    return evaluation.get_results(), evaluation.eval["precision"][..., 0, -1]
