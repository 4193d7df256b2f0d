"""Stable-DINO's loss and matching (Liu et al., ICCV 2023):
both look at positions, so that layers match alike.

Position-supervised loss: a positive aims at its squared IoU, the best of an image at 1.
Position-modulated cost: in the matching a query's score counts the less the worse its box. Its
memory fusion is a network part (`detector.encoder.fusion`).

| deviation from the released code | why |
| --- | --- |
| each query and target has its modulation | the code keeps it by class over the batch: targets overwrite others |
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from detrellis.matching import Hungarian, columns, focal_difference
from detrellis.schemes.base import TrainingScheme
from detrellis.schemes.config import StableConfig
from detrellis.set_loss import CLASSIFICATION, SetLoss
from detrellis.supervision import Supervision


def modulation(overlap: Tensor) -> Tensor:
    """`(GIoU + 1) / 2` of each query and target `(..., N, T)`,
    scaled up so that an image's best is 1.
    """
    value = ((overlap + 1) / 2).nan_to_num(0)
    return value / value.amax((-2, -1), keepdim=True).clamp(min=1e-8)


def modulated_term(logits: Tensor, labels: Tensor, overlap: Tensor, beta: float = 0.5) -> Tensor:
    """The focal class term of `p v^beta`, v the modulation."""
    return focal_difference(columns(logits, labels).sigmoid() * modulation(overlap) ** beta)


class Stable(TrainingScheme):
    """Stable-DINO's loss, whose weight stays 1 in denoising, and its matching."""

    name = "stable"
    requires = frozenset({"sigmoid_scores"})

    def __init__(self, config: StableConfig) -> None:
        super().__init__()
        self.config = config

    def supervision(self, base: Supervision) -> Supervision:
        """The base's with one or both replaced."""
        assert isinstance(base.assign, Hungarian)
        if self.config.modulated:
            cost = replace(
                base.assign.cost, class_term=partial(modulated_term, beta=self.config.beta)
            )
            base = replace(base, assign=replace(base.assign, cost=cost))
        if self.config.supervised:
            weights = {**base.weights, "class": self.config.classes}
            known = {**base.weights, "class": 1.0}
            assert isinstance(base.rule, SetLoss)
            rule = replace(CLASSIFICATION["psl"], iou_error=base.rule.iou_error)
            base = replace(base, rule=rule, weights=weights, known_weights=known)
        return base
