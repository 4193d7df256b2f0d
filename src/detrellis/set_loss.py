"""DETR's set loss: what the classes and boxes of matched queries learn,
and that all others are background.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis.losses import (
    ClassLoss,
    bce_loss,
    focal_loss,
    focal_negative,
    quality_focal_loss,
    varifocal_loss,
)
from detrellis.nn.constants import kept
from detrellis.pairs import (
    Pairs,
    SoftTarget,
    TargetRule,
    box_terms,
    decoupled_distillation,
    fine_grained_localization,
    hard_target,
    iou_target,
    last_rows,
    pair_up,
    quality_target,
    scaled_iou_target,
)
from detrellis.types import Assignment, DecoderOutput, Targets

# (output, targets, assignment, normaliser) to unweighted terms, each (L,): one value a decoder
# layer.
LossRule = Callable[[DecoderOutput, Targets, Assignment, Tensor], dict[str, Tensor]]
ABSENT = -1e4  # a logit of probability 0: as a negative it costs nothing and has no gradient


@dataclass(frozen=True)
class SetLoss:
    """DETR's set loss with sigmoid classification.

    `positive` is the class loss of the positives' logits of their targets' classes, which learn
    what `target` says. All other entries, the other classes of a positive too, are negatives.
    `iou_eps` is for comparing with reference codes (`boxes.iou`).
    """

    target: TargetRule = hard_target
    positive: ClassLoss = focal_loss
    negative_weight: float = 0.75  # of the negatives' focal loss
    gamma: float = 2.0  # its exponent
    detached: bool = False  # its factor carries no gradient
    iou_eps: float = 0.0
    iou_error: ClassLoss = bce_loss  # of the IoU branch's logits
    # A query that learns several targets learns the class of the last of its rows alone
    once: bool = False

    def __call__(
        self, output: DecoderOutput, targets: Targets, positives: Assignment, normaliser: Tensor
    ) -> dict[str, Tensor]:
        """`class`, `box` and `giou`, each `(L,)`, and `iou_branch` where the detector has one; of
        distributions also `fgl` `(L,)`, and `ddf` of all layers but the last."""
        return self.of_pairs(output, pair_up(output, targets, positives, self.iou_eps), normaliser)

    def of_pairs(
        self, output: DecoderOutput, pairs: Pairs, normaliser: Tensor
    ) -> dict[str, Tensor]:
        """All terms, of positives that are paired with their targets already."""
        learned = self.target(pairs)
        terms = self._classes(output, pairs, learned.target, normaliser)
        return terms | self._boxes(output, pairs, learned.box_weight, normaliser)

    def of_classes(
        self, output: DecoderOutput, targets: Targets, positives: Assignment, normaliser: Tensor
    ) -> dict[str, Tensor]:
        """The terms `class` and `iou_branch` alone."""
        pairs = pair_up(output, targets, positives, self.iou_eps)
        return self._classes(output, pairs, self.target(pairs).target, normaliser)

    def of_boxes(
        self, output: DecoderOutput, targets: Targets, positives: Assignment, normaliser: Tensor
    ) -> dict[str, Tensor]:
        """The other terms."""
        pairs = pair_up(output, targets, positives, self.iou_eps)
        return self._boxes(output, pairs, self.target(pairs).box_weight, normaliser)

    def pair_weight(
        self, output: DecoderOutput, targets: Targets, positives: Assignment
    ) -> Tensor | None:
        """What the losses of each positive's box and mask are multiplied by, `(M,)`; None: 1."""
        return self.target(pair_up(output, targets, positives, self.iou_eps)).box_weight

    def _classes(
        self, output: DecoderOutput, pairs: Pairs, target: Tensor, normaliser: Tensor
    ) -> dict[str, Tensor]:
        positives, labels = pairs.positives, pairs.labels
        learned = self.positive(pairs.logits, target)
        if self.once:
            last = last_rows(positives, output.logits.shape)
            labels = labels[last]
            learned = (last == torch.arange(len(last), device=last.device)).to(target) * learned
        # All entries as negatives, but for the positives'.
        where = (positives.layer, positives.image, positives.query)
        others = output.logits.index_put(
            (*where, labels), absent(output.logits.dtype, output.logits.device)
        )
        negative = self.negative_weight * focal_negative(
            others, self.gamma, detached=self.detached
        ).sum((1, 2, 3))
        terms = {"class": (negative + pairs.by_layer(learned)) / normaliser}
        if output.iou_logits is not None:
            errors = self.iou_error(output.iou_logits[where], pairs.iou)
            terms["iou_branch"] = pairs.by_layer(errors) / normaliser
        return terms

    def _boxes(
        self, output: DecoderOutput, pairs: Pairs, weight: Tensor | None, normaliser: Tensor
    ) -> dict[str, Tensor]:
        terms = box_terms(pairs, normaliser, weight)
        if output.sides is not None:
            terms["fgl"] = fine_grained_localization(pairs, output.sides, normaliser, weight)
            terms["ddf"] = decoupled_distillation(pairs, output.sides, output.logits)
        return terms


@kept(16)
def absent(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`ABSENT` as a logit, `()`."""
    return torch.tensor(ABSENT, dtype=dtype, device=device)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """`(p - t)^2` of probabilities (Cascade-DETR's IoU branch)."""
    return (logits.sigmoid() - targets) ** 2


IOU_ERRORS: dict[str, ClassLoss] = {"bce": bce_loss, "l2": squared_error}


def matchability_aware_loss(gamma: float = 1.5, negative_weight: float = 1.0) -> SetLoss:
    """MAL (DEIM, Huang et al., CVPR 2025): positives learn `IoU^gamma` at full weight,
    however low their IoU is, where VFL weighs them by it."""
    return SetLoss(
        lambda pairs: SoftTarget(pairs.iou**gamma),
        bce_loss,
        negative_weight=negative_weight,
        gamma=gamma,
        detached=True,
    )


# Classification by name. Each is trained with one-to-one matching where it comes from; see also
# `schemes/align.py`.
CLASSIFICATION = {
    "focal": SetLoss(),
    "qfl": SetLoss(iou_target, quality_focal_loss, negative_weight=1.0),
    "vfl": SetLoss(iou_target, varifocal_loss),
    "vfl_detached": SetLoss(iou_target, varifocal_loss, detached=True),  # RT-DETR's
    "psl": SetLoss(scaled_iou_target, lambda x, t: 0.25 * quality_focal_loss(x, t)),
    "mal": matchability_aware_loss(),
    "ia_bce": SetLoss(quality_target, bce_loss, negative_weight=1.0),
}


def softmax_class_loss(
    output: DecoderOutput,
    targets: Targets,
    positives: Assignment,
    normaliser: Tensor,
    *,
    no_object: float = 0.1,
) -> dict[str, Tensor]:
    """Cross-entropy over the classes and a last "no object" class of weight `no_object`:
    `class`, `(L,)`.

    A weighted mean over the queries, which no normaliser divides.
    """
    classes = output.logits.shape[-1]
    labels = torch.full(output.logits.shape[:-1], classes - 1, device=output.logits.device)
    labels[positives.layer, positives.image, positives.query] = targets.labels[positives.target]
    weight = torch.ones_like(output.logits[..., 0]).masked_fill(labels == classes - 1, no_object)
    entropy = F.cross_entropy(
        output.logits.flatten(0, 2), labels.flatten(), reduction="none"
    ).view_as(weight)
    return {"class": (weight * entropy).sum((1, 2)) / weight.sum((1, 2))}


def softmax_set_loss(
    output: DecoderOutput,
    targets: Targets,
    positives: Assignment,
    normaliser: Tensor,
    *,
    no_object: float = 0.1,
) -> dict[str, Tensor]:
    """DETR's own set loss: `softmax_class_loss` and the box terms,
    which alone `normaliser` divides.
    """
    classes = softmax_class_loss(output, targets, positives, normaliser, no_object=no_object)
    return classes | box_terms(pair_up(output, targets, positives), normaliser)
