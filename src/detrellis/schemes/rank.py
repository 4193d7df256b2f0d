"""Rank-DETR's loss and matching (Pu et al., NeurIPS 2023):
scores that rank detections by how well their boxes fit.

GIoU-aware loss: a positive's class learns its GIoU, brought to 0..1. High-order matching: late in
the run a query's cost is minus its score times a high power of its IoU, so that a match is one that
fits. Its rank layers are a network part (`nn/ranked.py`).

| deviation from the released code | why |
| --- | --- |
| the second cost begins at a fraction of the run, not at step 67,500 | runs differ in length; 0.75 of theirs is that |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, pairwise_iou
from detrellis.losses import quality_focal_loss
from detrellis.matching import Hungarian, MatchingCost, columns
from detrellis.pairs import giou_target
from detrellis.schemes.base import TrainingScheme
from detrellis.schemes.config import RankConfig
from detrellis.set_loss import SetLoss
from detrellis.supervision import Supervision


@dataclass(frozen=True)
class HighOrderCost(MatchingCost):
    """Minus a query's probability of the target's class, times a power of their IoU."""

    power: float = 4.0

    def __call__(self, logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Shapes as in `MatchingCost`."""
        overlap = pairwise_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
        return -columns(logits, labels).sigmoid() * overlap**self.power


GIOU_AWARE = SetLoss(giou_target, lambda x, t: 0.25 * quality_focal_loss(x, t))


class Rank(TrainingScheme):
    """Rank-DETR's loss, which the encoder's proposals go without,
    and from a part of the run on its matching.
    """

    name = "rank"
    requires = frozenset({"sigmoid_scores"})

    def __init__(self, config: RankConfig) -> None:
        super().__init__()
        self.config, self.done = config, 0.0

    def progress(self, done: float) -> None:
        """See `TrainingScheme`."""
        self.done = done

    def supervision(self, base: Supervision) -> Supervision:
        """The base's with this loss, and with this matching if it is time."""
        assert isinstance(base.assign, Hungarian)
        assert isinstance(base.rule, SetLoss)
        rule = replace(GIOU_AWARE, iou_error=base.rule.iou_error)
        supervision = replace(base, rule=rule, proposal_rule=base.rule)
        if self.done < self.config.after:
            return supervision
        # Masks cost far more than it, and would decide every match.
        matching = replace(base.assign, cost=HighOrderCost(power=self.config.power), masks=None)
        return replace(supervision, assign=matching)
