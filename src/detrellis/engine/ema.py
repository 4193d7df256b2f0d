"""An exponential moving average of the detector's weights,
which is what is evaluated and saved when it is on.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from detrellis.detector import Detector
from detrellis.engine.sharded import local


class EMA:
    """Averaged copy of a detector. Early on the decay is lower, so that the random start is
    forgotten soon: after n steps `(1 + n) / (10 + n)`, or the decay times `1 - exp(-n / ramp)`
    where a `ramp` is given."""

    def __init__(self, detector: Detector, decay: float, ramp: int = 0) -> None:
        self.decay, self.ramp = decay, ramp
        self.detector = copy.deepcopy(detector).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, detector: nn.Module, step: int) -> None:
        """Move towards `detector` after optimizer step `step` (from 1);
        buffers are averaged as well.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.ramp:
            decay = self.decay * (1 - math.exp(-step / self.ramp))
        averages, sources = [], []
        for average, source in zip(
            self.detector.state_dict().values(), detector.state_dict().values(), strict=True
        ):
            if average.is_floating_point():
                averages.append(local(average))
                sources.append(local(source))
            else:
                average.copy_(source)
        torch._foreach_lerp_(averages, sources, 1 - decay)
