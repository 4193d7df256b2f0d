"""Align-DETR (Cai et al., BMVC 2024, section 3.3): many-to-one matching, ranked candidates, and the Align Loss.

Each target is matched to k queries, its candidates, in every layer but the last. They are ranked by the quality of what
they predict, and learn the less the lower their rank: in classification towards a target that falls from the quality to
0, in regression with a weight that falls likewise. Confidence and IoU are thus taught to agree.

| deviation from the paper | why |
| --- | --- |
| the quality is at least `floor` in the target, not in the ranking | a query of IoU 0 would not be drawn to its class |
| ranks: unfloored quality, ties to the lower query | the released code ranks floored ones, in any order where all tie |
| k is capped in each image by itself, at least 1 | the released code's cap leaks to other images, and may be 0 |
| the target carries no gradient; class, L1 and GIoU are weighed as in the base | as the released code; unstated |
| the encoder's proposals get k candidates, denoising queries their own target at rank 0 | as the released code |

Eq. 3 is no proper loss: what minimises it lies between its target and 0.5, so a trained model's scores seldom exceed
0.7. They rank well; thresholds have to be chosen anew.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from detrellis.losses import bce_loss, focal_negative, focal_positive
from detrellis.matching import Candidates, Hungarian
from detrellis.schemes.base import TrainingScheme
from detrellis.supervision import Pairs, SetLoss, SoftTarget, Supervision, TargetRule, quality


def rank(score: Tensor, bag: Tensor) -> Tensor:
    """Place of each candidate in its bag by falling `score (M,)`, 0 = best: `(M,)`; ties keep their order."""
    order = score.argsort(descending=True, stable=True)
    order = order[bag[order].argsort(stable=True)]
    place = torch.arange(len(bag), device=bag.device)
    sorted_bag = bag[order]
    starts = torch.ones_like(bag, dtype=torch.bool)
    starts[1:] = sorted_bag[1:] != sorted_bag[:-1]
    first = torch.where(starts, place, 0).cummax(0).values if len(bag) else place
    return torch.empty_like(bag).index_put((order,), place - first)


def rank_weight(ranks: Tensor, tau: float) -> Tensor:
    """`exp(-r / tau)`: `(M,)` (Eq. 4 and 6)."""
    return torch.exp(-ranks / tau)


def align_loss(logits: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    """The Align Loss (Eq. 3): focal loss whose hard label has become a soft target in [0, 1]; elementwise."""
    return targets * focal_positive(logits, gamma) + (1 - targets) * focal_negative(logits, gamma)


class Align(TrainingScheme):
    """Align-DETR: `k` candidates a target, ranked, and the Align Loss.

    `k_encoder` is k of the encoder's proposals (None: `k`), `k_last` that of the last decoder layer. `alpha` weighs
    confidence against IoU in the quality, `tau` says how fast lower ranks fade, `gamma` is the focal exponent.
    `classification`: `"align"`; `"ia_bce"`, the loss of the released code; `"base"`, which leaves the classes to the
    base's loss. `rank_boxes=False` weighs the box losses of all candidates alike.
    """

    name = "align"
    requires = frozenset({"sigmoid_scores"})

    def __init__(
        self,
        *,
        k: int = 4,
        k_encoder: int | None = None,
        k_last: int = 1,
        alpha: float = 0.25,
        tau: float = 1.5,
        gamma: float = 2.0,
        floor: float = 0.01,
        classification: Literal["align", "ia_bce", "base"] = "align",
        rank_boxes: bool = True,
        iou_eps: float = 0.0,
    ) -> None:
        super().__init__()
        self.candidates = Candidates(encoder=k if k_encoder is None else k_encoder, intermediate=k, last=k_last)
        self.alpha, self.tau, self.gamma, self.floor = alpha, tau, gamma, floor
        self.classification, self.rank_boxes, self.iou_eps = classification, rank_boxes, iou_eps

    def supervision(self, base: Supervision) -> Supervision:
        """Mixed matching; Eq. 5 for the classes, Eq. 6 for the boxes."""
        assert isinstance(base.assign, Hungarian)
        assert isinstance(base.rule, SetLoss)
        if self.classification == "base":
            rule = replace(base.rule, target=partial(self.weigh, base.rule.target))
        else:
            positive = bce_loss if self.classification == "ia_bce" else partial(align_loss, gamma=self.gamma)
            rule = SetLoss(self.soft_target, positive, negative_weight=1.0, gamma=self.gamma, iou_eps=self.iou_eps)
        return replace(base, assign=replace(base.assign, candidates=self.candidates), rule=rule)

    @torch.no_grad()
    def soft_target(self, pairs: Pairs) -> SoftTarget:
        """The target `exp(-r / tau) q` (Eq. 4) and the weight of the box losses (Eq. 6)."""
        q = quality(pairs, self.alpha)
        weight = rank_weight(rank(q, pairs.positives.candidate_set).to(q), self.tau)
        return SoftTarget(weight * q.clamp(min=self.floor), weight if self.rank_boxes else None)

    def weigh(self, base: TargetRule, pairs: Pairs) -> SoftTarget:
        """The base's target, and the weight of the box losses."""
        return base(pairs)._replace(box_weight=self.soft_target(pairs).box_weight)
