"""What tests of the engine share."""

from __future__ import annotations

import pytest
from torch import Tensor

from detrellis.engine.train import TrainRun


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights right before the first step: the detector's, and the average's."""
    found: list[dict[str, Tensor]] = []
    train_step = TrainRun.train_step

    def step(self: TrainRun, batches: list) -> None:  # type: ignore[type-arg]
        if not found:
            detectors = (self.state.model.detector, self.state.detector)
            found.extend({n: t.clone() for n, t in d.state_dict().items()} for d in detectors)
        train_step(self, batches)

    monkeypatch.setattr(TrainRun, "train_step", step)
    return found
