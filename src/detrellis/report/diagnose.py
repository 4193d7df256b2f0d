"""From an evaluation to its errors: hotcoco says what is right, what is missed and what contradicts
the data set; here stands what it does not compute, the threshold that maximises F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrellis.data.annotations import Annotations
from detrellis.engine.coco_eval import CocoEvaluator, Evaluated
from detrellis.engine.eval_result import Kind
from detrellis.errors import UserError
from detrellis.report.record import (
    CalibrationBin,
    ClassErrors,
    Confusion,
    Diagnosis,
    LabelError,
    Operating,
)

MATRIX = 20  # classes of which the whole confusion matrix is kept
LISTED = 100  # label errors, and confusions

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Diagnosed:
    """The diagnosis, with the detections and boxes that the galleries show."""

    diagnosis: Diagnosis
    done: Evaluated
    wrong: Int  # numbers of the sure detections that match nothing, the surest first
    missed: Int  # numbers of the boxes that no sure detection matches
    # Hotcoco's label errors of the kind wrong_label, the surest first
    confused: tuple[Mapping[str, Any], ...]


def diagnose(evaluator: CocoEvaluator, of: Kind = "box") -> Diagnosed:
    """What is wrong with what was collected.
    Raises `UserError` where hotcoco is missing, and for LVIS.
    """
    a = evaluator.annotations
    if a.federation is not None:
        raise UserError(
            "LVIS does not say all objects of an image, so nobody knows which detections are "
            "false alarms"
        )
    done = evaluator.evaluated(of)
    e, scores = done.evaluation, done.rows[:, 5]
    if not hasattr(e, "image_diagnostics"):
        raise UserError("an error analysis needs hotcoco", "pip install -U hotcoco")
    # Right and wrong detections; those of crowd regions are neither.
    status = e.image_diagnostics()["dt_status"]
    right, wrong = (_of_status(status, word, len(scores)) for word in ("tp", "fp"))
    counted = right | wrong
    boxes = done.truth.category[~done.truth.crowd] - 1
    best, f1_curve = operating_point(scores[counted], right[counted], len(boxes))
    # What is sure: from the threshold on.
    sure = 0.5 if best.threshold is None else best.threshold
    seen = e.image_diagnostics(score_thr=sure)
    suspects = sorted(
        seen["label_errors"], key=lambda error: (error["type"] != "wrong_label", -error["dt_score"])
    )
    named = np.flatnonzero(wrong & (scores >= sure))
    finders = {
        detection for detection, _ in seen["dt_match"].items() if scores[detection - 1] >= sure
    }
    detected = {seen["dt_match"][detection] for detection in finders}
    boxes_counted = np.flatnonzero(~done.truth.crowd) + 1
    missed = np.array(
        [box for box in boxes_counted.tolist() if box not in detected], dtype=np.int64
    )
    tide, calibration = e.tide_errors(), e.calibration()
    matrix = np.asarray(e.confusion_matrix(iou_thr=0.5, min_score=sure)["matrix"], dtype=np.int64)
    classes = _by_class(done, a.classes.names, counted, right, boxes)
    diagnosis = Diagnosis(
        classes=classes,
        best=best,
        f1_curve=f1_curve,
        matrix=tuple(map(tuple, matrix.tolist())) if len(classes) <= MATRIX else (),
        confusions=_confusions(matrix, (*a.classes.names, None)),
        tide={name: float(gain) for name, gain in tide["delta_ap"].items()},
        tide_counts={name: int(count) for name, count in tide["counts"].items()},
        calibration_error=float(calibration["ece"]),
        calibration=_bins(calibration["bins"]),
        label_errors=tuple(_label_error(error, done, a) for error in suspects[:LISTED]),
        label_errors_found=len(suspects),
    )
    ranked = named[np.argsort(-scores[named], kind="stable")] + 1
    return Diagnosed(
        diagnosis, done, ranked, missed, tuple(s for s in suspects if s["type"] == "wrong_label")
    )


def operating_point(
    scores: Float, right: NDArray[np.bool_], boxes: int
) -> tuple[Operating, tuple[float, ...]]:
    """The threshold with the highest F1, and F1 at the thresholds 0, 0.01, ..., 1.

    `right` says of each detection whether it matches one of the `boxes`. The threshold is halfway
    between the last detection that is taken and the first that is not, so that rounding moves none
    over it.
    """
    if not boxes or not len(scores):
        return Operating(), ()
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    true_positives = np.cumsum(right[order])
    taken = np.arange(1, len(ranked) + 1)
    f1 = 2 * true_positives / (taken + boxes)
    last = np.append(ranked[1:] < ranked[:-1], True)  # equal scores are taken together
    at = int(np.argmax(np.where(last, f1, -1)))
    below = ranked[at + 1] if at + 1 < len(ranked) else 0.0
    grid = np.searchsorted(-ranked, -np.linspace(0, 1, 101), side="right")
    curve = np.where(grid > 0, f1[np.maximum(grid, 1) - 1], 0.0)
    point = Operating(
        threshold=float((ranked[at] + below) / 2),
        f1=float(f1[at]),
        precision=float(true_positives[at] / taken[at]),
        recall=float(true_positives[at] / boxes),
    )
    return point, tuple(np.round(curve, 4).tolist())


def _of_status(status: Mapping[int, str], word: str, count: int) -> NDArray[np.bool_]:
    """Which of the detections 1, 2, ..., count have this status."""
    return np.array([status.get(number) == word for number in range(1, count + 1)], dtype=np.bool_)


def _by_class(
    done: Evaluated,
    names: Sequence[str],
    counted: NDArray[np.bool_],
    right: NDArray[np.bool_],
    boxes: Int,
) -> tuple[ClassErrors, ...]:
    """The errors of each class. `counted` and `right` are of the detections,
    `boxes` the class index of each box that counts.
    """
    scores, errors = done.rows[:, 5], []
    for k, name in enumerate(names):
        of_class, in_truth = counted & (done.labels == k), int((boxes == k).sum())
        point, _ = operating_point(scores[of_class], right[of_class], in_truth)
        errors.append(_class_errors(name, done, k, point, in_truth, int(of_class.sum())))
    return tuple(errors)


def _bins(bins: Sequence[Mapping[str, Any]]) -> tuple[CalibrationBin, ...]:
    """hotcoco's calibration, as the record holds it."""
    return tuple(
        CalibrationBin(
            count=int(b["count"]),
            score=float(b["avg_confidence"]),
            right=float(b["avg_accuracy"]),
        )
        for b in bins
    )


def _class_errors(
    name: str, done: Evaluated, k: int, best: Operating, boxes: int, detections: int
) -> ClassErrors:
    precision = np.asarray(done.evaluation.eval["precision"])[:, :, k, :, -1]  # (IoU, recall, area)
    ap, *by_size = (_mean(precision[:, :, area]) for area in range(4))
    curve = tuple(np.round(precision[0, :, 0], 4).tolist()) if boxes else ()
    return ClassErrors(
        name=name,
        ap=ap,
        ap50=_mean(precision[0, :, 0]),
        by_size=tuple(by_size),
        boxes=boxes,
        detections=detections,
        best=best,
        curve=curve,
    )


def _mean(precision: Float) -> float | None:
    """COCO's mean: None where all is -1."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _confusions(matrix: Int, names: tuple[str | None, ...]) -> tuple[Confusion, ...]:
    """The entries beside the diagonal, the largest first."""
    beside = matrix - np.diag(np.diag(matrix))
    places = np.argsort(-beside, axis=None, kind="stable")[:LISTED]
    rows, columns = np.unravel_index(places, beside.shape)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return tuple(
        Confusion(given=names[i], detected=names[j], count=int(beside[i, j]))
        for i, j in pairs
        if beside[i, j]
    )


def _label_error(error: Mapping[str, Any], done: Evaluated, a: Annotations) -> LabelError:
    """hotcoco's, with the data set's own file, ids and names."""
    box, names = error["gt_id"], a.classes.names
    place = None if box is None else int(done.shown[box - 1])
    return LabelError(
        file=str(a.path(int(done.order[error["image_id"] - 1]))),
        kind=str(error["type"]),
        annotation=None if place is None else int(a.ids[place]),
        given=None if place is None else names[int(a.labels[place])],
        detected=names[int(error["dt_category_id"]) - 1],
        score=float(error["dt_score"]),
        iou=float(error["iou"]),
    )
