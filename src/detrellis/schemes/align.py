"""Align-DETR (Cai et al., BMVC 2024, section 3.3):
many-to-one matching, ranked candidates, and the Align Loss.

Each target is matched to k queries, its candidates, in every layer but the last. They are ranked by
the quality of what they predict, and learn the less the lower their rank: in classification towards
a target that falls from the quality to 0, in regression with a weight that falls likewise.
Confidence and IoU are thus taught to agree.

| deviation from the paper | why |
| --- | --- |
| the quality is at least `floor` in the target, not in the ranking | a query of IoU 0 would not be drawn to its class |
| ranks: unfloored quality, ties to the lower query | the released code ranks floored ones, in any order where all tie |
| k is capped in each image by itself, at least 1 | the released code's cap leaks to other images, and may be 0 |
| the target carries no gradient; class, L1 and GIoU are weighed as in the base | as the released code; unstated |
| the encoder's proposals get k candidates, denoising queries their own target at rank 0 | as the released code |

Eq. 3 is no proper loss: what minimises it lies between its target and 0.5, so a trained model's
scores seldom exceed 0.7. They rank well; thresholds have to be chosen anew.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from detrellis.losses import bce_loss, focal_negative, focal_positive
from detrellis.matching import Candidates, Hungarian
from detrellis.pairs import Pairs, SoftTarget, TargetRule, quality
from detrellis.schemes.base import TrainingScheme
from detrellis.schemes.config import AlignConfig
from detrellis.schemes.ranks import rank
from detrellis.set_loss import SetLoss
from detrellis.supervision import Supervision


def rank_weight(ranks: Tensor, tau: float) -> Tensor:
    """`exp(-r / tau)`: `(M,)` (Eq. 4 and 6)."""
    return torch.exp(-ranks / tau)


def align_loss(logits: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    """The Align Loss (Eq. 3): focal loss whose hard label has become a soft target in [0,
    1]; elementwise.
    """
    return targets * focal_positive(logits, gamma) + (1 - targets) * focal_negative(logits, gamma)


class Align(TrainingScheme):
    """Several candidates for each target, ranked, and the Align Loss."""

    name = "align"
    requires = frozenset({"sigmoid_scores"})

    def __init__(self, config: AlignConfig) -> None:
        super().__init__()
        self.config = config

    def supervision(self, base: Supervision) -> Supervision:
        """Mixed matching; Eq. 5 for the classes, Eq. 6 for the boxes."""
        assert isinstance(base.assign, Hungarian)
        assert isinstance(base.rule, SetLoss)
        config = self.config
        if config.classification == "base":
            rule = replace(base.rule, target=partial(self.weigh, base.rule.target))
        else:
            positive = (
                bce_loss
                if config.classification == "ia_bce"
                else partial(align_loss, gamma=config.gamma)
            )
            rule = SetLoss(
                self.soft_target,
                positive,
                negative_weight=1.0,
                gamma=config.gamma,
                iou_eps=config.iou_eps,
            )
            rule = replace(rule, iou_error=base.rule.iou_error)
        encoder = config.k if config.k_encoder is None else config.k_encoder
        candidates = Candidates(encoder=encoder, intermediate=config.k, last=config.k_last)
        return replace(
            base, assign=replace(base.assign, candidates=candidates, union=False), rule=rule
        )

    @torch.no_grad()
    def soft_target(self, pairs: Pairs) -> SoftTarget:
        """The target `exp(-r / tau) q` (Eq. 4) and the weight of the box losses (Eq. 6)."""
        q = quality(pairs, self.config.alpha)
        weight = rank_weight(rank(q, pairs.positives.candidate_set).to(q), self.config.tau)
        return SoftTarget(
            weight * q.clamp(min=self.config.floor), weight if self.config.rank_boxes else None
        )

    def weigh(self, base: TargetRule, pairs: Pairs) -> SoftTarget:
        """The base's target, and the weight of the box losses."""
        return base(pairs)._replace(box_weight=self.soft_target(pairs).box_weight)
