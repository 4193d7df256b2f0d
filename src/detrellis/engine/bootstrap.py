"""AP over resampled images: how far a validation set of this size lets AP be known.

A bootstrap (Efron, 1979): images are drawn with replacement, as many as there are, and AP is
computed for each draw. An image that is drawn w times counts w times in every cumulative sum, so
that matching is done once. The draws depend on the number of images alone: two detectors that are
evaluated on the same images have the same draws, and the difference of their APs can be taken draw
by draw.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

RESAMPLES = 200
# In larger sets images leave little noise, and the matches of all would fill the memory
MAX_IMAGES = 2000
QUANTILE = statistics.NormalDist().inv_cdf(0.975)
RECALLS = np.linspace(0, 1, 101)  # where COCO reads precision


def resampled_ap(
    matches: Sequence[Mapping[str, Any] | None], image_ids: Sequence[int]
) -> tuple[float, ...]:
    """AP in 0..1 of each of `RESAMPLES` draws; NaN where a draw holds no ground truth.

    `matches`: `evalImgs` of a COCO evaluation, of one area and one number of detections;
    `image_ids`: all images that were evaluated, in the evaluator's order.
    """
    count = len(image_ids)
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    weights = np.stack([np.bincount(draw, minlength=count) for draw in draws]).astype(np.float64)
    place = {image: n for n, image in enumerate(image_ids)}
    by_class: dict[int, list[Mapping[str, Any]]] = {}
    for match in matches:
        if match is not None:
            by_class.setdefault(match["category_id"], []).append(match)
    total, classes = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for of_class in by_class.values():
        ap = _class_ap(of_class, [place[match["image_id"]] for match in of_class], weights)
        present = np.isfinite(ap)
        total[present] += ap[present]
        classes += present
    with np.errstate(invalid="ignore"):
        return tuple((total / classes).tolist())


def _class_ap(matches: Sequence[Mapping[str, Any]], places: Sequence[int], weights: Float) -> Float:
    """AP of one class in each draw `(R,)`, of the `weights (R, I)` of the images;
    NaN where it has no ground truth.
    """
    truth = np.array(
        [np.count_nonzero(~np.asarray(match["gtIgnore"], dtype=np.bool_)) for match in matches]
    )
    positives = weights[:, places] @ truth
    # All detections of the class, best first; equal scores stay in the images' order, as in COCO's
    # evaluation.
    scores = np.concatenate([np.asarray(match["dtScores"], dtype=np.float64) for match in matches])
    owner = np.repeat(places, [len(match["dtScores"]) for match in matches])
    order = np.argsort(-scores, kind="stable")
    ignored, matched = (
        np.concatenate(
            [np.asarray(match[key], dtype=np.float64).reshape(10, -1) != 0 for match in matches],
            axis=1,
        )
        for key in ("dtIgnore", "dtMatches")
    )
    ignored, hits, drawn = (
        ignored[:, order],
        (matched & ~ignored)[:, order],
        weights[:, owner[order]],
    )
    seen = np.cumsum(drawn, axis=1)
    by_threshold = []
    for hit, passed_over in zip(hits, ignored, strict=True):
        counted = np.cumsum(drawn * ~passed_over, axis=1) if passed_over.any() else seen
        by_threshold.append(
            _average_precision(np.cumsum(drawn[:, hit], axis=1), counted[:, hit], positives)
        )
    ap: Float = np.mean(by_threshold, axis=0)
    ap[positives == 0] = np.nan
    return ap


def _average_precision(true: Float, seen: Float, positives: Float) -> Float:
    """AP at one IoU `(R,)`, of the numbers of true `(R, H)` and of all detections `(R, H)` down to
    each hit.
    """
    precision = np.divide(true, seen, out=np.zeros_like(true), where=seen > 0)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # Each hit answers for the points of recall that it reaches and the one before it does not.
    recall = np.divide(
        true, positives[:, None], out=np.zeros_like(true), where=positives[:, None] > 0
    )
    reached = np.searchsorted(RECALLS, recall, side="right")
    fresh = np.diff(reached, axis=1, prepend=0)
    average: Float = (fresh * envelope).sum(axis=1) / len(RECALLS)
    return average


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval that resampled `values` give, by their standard deviation;
    None with fewer than two.
    """
    defined = [value for value in values if math.isfinite(value)]
    return QUANTILE * statistics.stdev(defined) if len(defined) > 1 else None
