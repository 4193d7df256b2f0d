"""Supervision of a block of queries: which query learns which target, and by what loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, iou
from detrellis.losses import (
    ClassLoss,
    bce_loss,
    focal_loss,
    focal_negative,
    giou_loss,
    l1_loss,
    quality_focal_loss,
    varifocal_loss,
)
from detrellis.matching import Assign, Hungarian, Known, Match, assign
from detrellis.types import Assignment, DecoderOutput, Targets

# (output, targets, assignment, normaliser) to unweighted terms, each (L,): one value a decoder layer.
LossRule = Callable[[DecoderOutput, Targets, Assignment, Tensor], dict[str, Tensor]]
ABSENT = -1e4  # a logit of probability 0: as a negative it costs nothing and has no gradient


def sum_by_layer(values: Tensor, layer: Tensor, layers: int) -> Tensor:
    """Sum `values (M,)` into `(layers,)`; a product, because a scatter is not deterministic on a GPU."""
    member = layer == torch.arange(layers, device=layer.device).unsqueeze(1)
    return member.to(values.dtype) @ values


class Pairs(NamedTuple):
    """Positives with their targets, as a loss rule sees them; gradients flow through `logits` and `boxes` only."""

    logits: Tensor  # (M,) of the target's class
    boxes: Tensor  # (M, 4)
    target_boxes: Tensor  # (M, 4)
    iou: Tensor  # (M,) of predicted and target boxes
    positives: Assignment
    layers: int
    images: int


def pair_up(output: DecoderOutput, targets: Targets, positives: Assignment, iou_eps: float = 0.0) -> Pairs:
    """Gather what the positives predicted, and their targets; `iou_eps` is added to unions (`boxes.iou`)."""
    where = (positives.layer, positives.image, positives.query)
    boxes, target_boxes = output.boxes[where], targets.boxes[positives.target]
    overlap = iou(cxcywh_to_xyxy(boxes.detach()), cxcywh_to_xyxy(target_boxes), iou_eps)
    logits = output.logits[(*where, targets.labels[positives.target])]
    layers, images = output.logits.shape[:2]
    return Pairs(logits, boxes, target_boxes, overlap, positives, layers, images)


class SoftTarget(NamedTuple):
    """What each positive should learn."""

    target: Tensor  # (M,) in [0, 1]: of the logit of the target's class
    box_weight: Tensor | None = None  # (M,) of its box losses; None: 1


# What positives should learn, by their outputs and targets. No gradient flows through it.
TargetRule = Callable[[Pairs], SoftTarget]


def hard_target(pairs: Pairs) -> SoftTarget:
    """1: the class is there (focal loss)."""
    return SoftTarget(torch.ones_like(pairs.iou))


def iou_target(pairs: Pairs) -> SoftTarget:
    """The IoU of the predicted box with its target (QFL, VFL)."""
    return SoftTarget(pairs.iou)


def scaled_iou_target(pairs: Pairs) -> SoftTarget:
    """The squared IoU, scaled up so that the best positive of each image and layer learns 1 (Stable-DINO, PSL)."""
    target = pairs.iou**2
    owner = pairs.positives.layer * pairs.images + pairs.positives.image
    member = owner == torch.arange(pairs.layers * pairs.images, device=owner.device).unsqueeze(1)
    best = (member * target).amax(1) if len(target) else target.new_ones(len(member))
    return SoftTarget(target / best.clamp(min=1e-8)[owner])


def quality_target(pairs: Pairs, alpha: float = 0.25, floor: float = 0.01) -> SoftTarget:
    """The quality `p^alpha IoU^(1 - alpha)`, at least `floor` (IA-BCE without ranks, as real-time DETRs train with)."""
    return SoftTarget(quality(pairs, alpha).clamp(min=floor))


def quality(pairs: Pairs, alpha: float) -> Tensor:
    """`q = p^alpha u^(1 - alpha)` of each pair, p its score and u its IoU: `(M,)` (Align-DETR, Eq. 2)."""
    return pairs.logits.detach().sigmoid() ** alpha * pairs.iou ** (1 - alpha)


def box_terms(pairs: Pairs, normaliser: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> dict[str, Tensor]:
    """L1 and GIoU of the positives, summed over each layer and divided by the number of boxes."""
    terms = {"box": l1_loss(pairs.boxes, pairs.target_boxes), "giou": giou_loss(pairs.boxes, pairs.target_boxes, eps)}
    if weight is not None:
        terms = {name: weight * t for name, t in terms.items()}
    return {name: sum_by_layer(t, pairs.positives.layer, pairs.layers) / normaliser for name, t in terms.items()}


@dataclass(frozen=True)
class SetLoss:
    """DETR's set loss with sigmoid classification.

    `positive` is the class loss of the positives' logits of their targets' classes, which learn what `target` says. All
    other entries, the other classes of a positive too, are negatives. `iou_eps` is for comparing with reference codes
    (`boxes.iou`).
    """

    target: TargetRule = hard_target
    positive: ClassLoss = focal_loss
    negative_weight: float = 0.75  # of the negatives' focal loss
    gamma: float = 2.0  # its exponent
    detached: bool = False  # its factor carries no gradient
    iou_eps: float = 0.0

    def __call__(
        self, output: DecoderOutput, targets: Targets, positives: Assignment, normaliser: Tensor
    ) -> dict[str, Tensor]:
        """`class`, `box` and `giou`, each `(L,)`, and `iou_branch` where the detector has one."""
        pairs = pair_up(output, targets, positives, self.iou_eps)
        learned = self.target(pairs)
        # All entries as negatives, but for the positives'.
        where = (positives.layer, positives.image, positives.query, targets.labels[positives.target])
        others = output.logits.index_put(where, output.logits.new_tensor(ABSENT))
        negative = self.negative_weight * focal_negative(others, self.gamma, detached=self.detached).sum((1, 2, 3))
        # The positives.
        positive = sum_by_layer(self.positive(pairs.logits, learned.target), positives.layer, pairs.layers)
        terms = {"class": (negative + positive) / normaliser}
        terms |= box_terms(pairs, normaliser, learned.box_weight, self.iou_eps)
        if output.iou_logits is not None:
            predicted = output.iou_logits[positives.layer, positives.image, positives.query]
            errors = bce_loss(predicted, pairs.iou)
            terms["iou_branch"] = sum_by_layer(errors, positives.layer, pairs.layers) / normaliser
        return terms


def matchability_aware_loss(gamma: float = 1.5, negative_weight: float = 1.0) -> SetLoss:
    """MAL (DEIM, Huang et al., CVPR 2025): positives learn `IoU^gamma` at full weight, however low their IoU is, where
    VFL weighs them by it."""
    return SetLoss(
        lambda pairs: SoftTarget(pairs.iou**gamma),
        bce_loss,
        negative_weight=negative_weight,
        gamma=gamma,
        detached=True,
    )


# Classification by name. Each is trained with one-to-one matching where it comes from; see also `schemes/align.py`.
CLASSIFICATION = {
    "focal": SetLoss(),
    "qfl": SetLoss(iou_target, quality_focal_loss, negative_weight=1.0),
    "vfl": SetLoss(iou_target, varifocal_loss),
    "vfl_detached": SetLoss(iou_target, varifocal_loss, detached=True),  # RT-DETR's
    "psl": SetLoss(scaled_iou_target, lambda x, t: 0.25 * quality_focal_loss(x, t)),
    "mal": matchability_aware_loss(),
    "ia_bce": SetLoss(quality_target, bce_loss, negative_weight=1.0),
}


def softmax_set_loss(
    output: DecoderOutput, targets: Targets, positives: Assignment, normaliser: Tensor, *, no_object: float = 0.1
) -> dict[str, Tensor]:
    """DETR's own set loss: cross-entropy over the classes and a last "no object" class of weight `no_object`.

    The cross-entropy is a weighted mean over the queries; `normaliser` divides the box terms only.
    """
    classes = output.logits.shape[-1]
    labels = torch.full(output.logits.shape[:-1], classes - 1, device=output.logits.device)
    labels[positives.layer, positives.image, positives.query] = targets.labels[positives.target]
    weight = torch.where(labels == classes - 1, no_object, 1.0).to(output.logits)
    entropy = F.cross_entropy(output.logits.flatten(0, 2), labels.flatten(), reduction="none").view_as(weight)
    mean = (weight * entropy).sum((1, 2)) / weight.sum((1, 2))
    return {"class": mean, **box_terms(pair_up(output, targets, positives), normaliser)}


@dataclass(frozen=True)
class Supervision:
    """Assignment, loss rule, and the weight of each of the rule's terms."""

    assign: Assign = field(default_factory=Hungarian)
    rule: LossRule = field(default_factory=SetLoss)
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"class": 1.0, "box": 5.0, "giou": 2.0, "iou_branch": 1.0}
    )
    known_weights: Mapping[str, float] | None = None  # of pairs that are not matched; None: the same

    def known(self, assignment: Assignment) -> Supervision:
        """This supervision with an assignment that is known beforehand, as denoising's."""
        return replace(self, assign=Known(assignment), weights=self.known_weights or self.weights)

    def proposals(self) -> Supervision:
        """This supervision for the encoder's proposals, which are one layer."""
        assert isinstance(self.assign, Hungarian)
        return replace(self, assign=self.assign.for_proposals())

    def task(
        self, name: str, output: DecoderOutput, targets: Targets, normaliser: Tensor, copies: int = 1, weight: float = 1
    ) -> Task:
        """This supervision of a block's `output`, matched in each of its `copies`, its losses times `weight`."""
        weights = {term: of_term * weight for term, of_term in self.weights.items()}
        return Task(name, Match(output, targets, self.assign, copies), self.rule, weights, normaliser)


def leaving_out(rule: LossRule, unused: Tensor) -> LossRule:
    """`rule` without the queries `unused (B, N)`, of slots that hold nothing: they do not even count as negatives."""

    def masked(
        output: DecoderOutput, targets: Targets, assignment: Assignment, normaliser: Tensor
    ) -> dict[str, Tensor]:
        logits = output.logits.masked_fill(unused.unsqueeze(-1), ABSENT)
        return rule(output._replace(logits=logits), targets, assignment, normaliser)

    return masked


@dataclass(frozen=True)
class Task:
    """One block's matching problem, and what its loss needs beside the assignment."""

    name: str
    match: Match
    rule: LossRule
    weights: Mapping[str, float]  # of the rule's terms
    normaliser: Tensor  # scalar: the number of boxes that the sums are divided by


def match(tasks: Sequence[Task]) -> list[Assignment]:
    """The assignments of all tasks, with one copy to the host."""
    return assign([task.match for task in tasks])


def supervise(
    tasks: Sequence[Task], assignments: Sequence[Assignment] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weighted losses `"block/term/layer"` of all tasks, and metrics; matched first where they are not.

    Losses and boxes are computed in float32 or better whatever autocast says.
    """
    assignments = match(tasks) if assignments is None else assignments
    losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    for task, positives in zip(tasks, assignments, strict=True):
        output, targets = task.match.output, task.match.targets
        with torch.autocast(output.boxes.device.type, enabled=False):
            output = output.map(partial(Tensor.to, dtype=targets.boxes.dtype))
            terms = task.rule(output, targets, positives, task.normaliser)
        for name, values in terms.items():
            weighted = values * task.weights[name]
            losses |= {f"{task.name}/{name}/{layer}": v for layer, v in enumerate(weighted.unbind())}
        metrics[f"{task.name}/iou"] = matched_iou(output, targets, positives)
    return losses, metrics


@torch.no_grad()
def matched_iou(output: DecoderOutput, targets: Targets, positives: Assignment) -> Tensor:
    """Mean IoU of the last layer's positives with their targets; NaN where there is none."""
    last = len(output.boxes) - 1
    predicted = output.boxes[positives.layer, positives.image, positives.query]
    overlap = iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(targets.boxes[positives.target]))
    chosen = positives.layer == last
    return (overlap * chosen).sum() / chosen.sum()
