"""The record of an error analysis. All else reads it:
`report.json` holds it, `page.py` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from detrellis.engine.eval_result import EvalResult


@dataclass(frozen=True, kw_only=True)
class Operating:
    """The score threshold with the highest F1 at IoU 0.5, and what detecting from there gives;
    all None without boxes or detections."""

    threshold: float | None = None
    f1: float | None = None
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassErrors:
    """One class: COCO's AP, its threshold, and its curve."""

    name: str
    ap: float | None
    ap50: float | None
    by_size: tuple[float | None, ...]  # AP of small, medium and large objects
    boxes: int
    detections: int
    best: Operating
    # Precision at the recalls 0, 0.01, ..., 1, at IoU 0.5; empty without boxes
    curve: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Objects of one class that are detected as another; None is the background."""

    given: str | None
    detected: str | None
    count: int


@dataclass(frozen=True, kw_only=True)
class LabelError:
    """An annotation that is probably wrong, or missing:
    a sure detection that contradicts the data set.
    """

    file: str
    kind: str  # hotcoco's: wrong_label, missing_annotation
    annotation: int | None  # its id
    given: str | None
    detected: str
    score: float
    iou: float


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Detections whose score is in one tenth:
    their mean score, and how many of them are right at IoU 0.5.
    """

    count: int
    score: float
    right: float


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong with the detections of an evaluation, all at IoU 0.5."""

    classes: tuple[ClassErrors, ...]
    best: Operating  # of all classes together: what "sure" means below
    f1_curve: tuple[float, ...]  # of all classes together, at the thresholds 0, 0.01, ..., 1
    # True class, detected class, the background last; empty of too many classes
    matrix: tuple[tuple[int, ...], ...]
    # The most frequent ones, the misses and false alarms among them
    confusions: tuple[Confusion, ...]
    tide: Mapping[str, float]  # AP that would be gained without this kind of error
    tide_counts: Mapping[str, int]
    calibration_error: float  # mean difference of score and precision
    calibration: tuple[CalibrationBin, ...]
    label_errors: tuple[LabelError, ...]  # the surest, wrong labels first
    label_errors_found: int


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A training epoch of the log."""

    number: int
    loss: float | None
    ap: float | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that went wrong, drawn small."""

    file: str
    caption: str
    jpeg: bytes


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page shows."""

    title: str
    command: str
    result: EvalResult
    diagnosis: Diagnosis
    epoch: int  # of the weights
    step: int
    facts: Mapping[str, Mapping[str, str]]  # of the data, the recipe and the costs
    recipe: str  # as JSON
    history: tuple[Epoch, ...] = ()
    galleries: Mapping[str, tuple[Picture, ...]]

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON holds it,
        without the pictures and the recipe, which the weights hold.
        """
        data = {
            name: value for name, value in vars(self).items() if name not in ("galleries", "recipe")
        }
        data |= {"result": self.result.to_dict(), "diagnosis": asdict(self.diagnosis)}
        return data | {"history": [asdict(epoch) for epoch in self.history]}
