"""What is served: a detector, its classes, and from which scores on they count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from detrellis.data.classes import ClassMap
from detrellis.loading import load, trained
from detrellis.predictions.inputs import find_pictures
from detrellis.predictions.record import Prediction, collect_predictions
from detrellis.report.thresholds import class_thresholds
from detrellis.serving.batcher import Detect


@dataclass(frozen=True)
class Served:
    """The detector that is served."""

    detect: Detect  # everything it detects in pictures, whatever its score
    name: str
    classes: ClassMap
    thresholds: Sequence[float]  # by class index, where a request names none


def open_served(
    run: str | Path,
    threshold: float | Literal["auto"],
    nms: float | None = None,
    device: str | None = None,
    half: bool = False,
) -> Served:
    """Load a run, or whatever else `load` takes that is trained."""
    place = trained(run)
    model = load(place, device=device, half=half).fused()
    count = len(model.classes)
    thresholds = (
        class_thresholds(place, model.classes) if threshold == "auto" else [threshold] * count
    )

    def detect(pictures: Sequence[Tensor]) -> list[Prediction]:
        return collect_predictions(
            model.detect(find_pictures(pictures), 0.0, nms, len(pictures)), "raise"
        )

    return Served(detect, model.recipe.name, model.classes, thresholds)
