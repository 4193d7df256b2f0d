"""How a block of queries is taught: which query learns which target, and by what loss."""

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
    absence_loss,
    bce_loss,
    focal_loss,
    giou_loss,
    l1_loss,
    quality_focal_loss,
    varifocal_loss,
)
from detrellis.matching import Assign, Hungarian, Known, Match, assign
from detrellis.types import Assignment, DecoderOutput, Targets

# (output, targets, assignment, normaliser) to unweighted terms, each (L,): one value a decoder layer.
LossRule = Callable[[DecoderOutput, Targets, Assignment, Tensor], dict[str, Tensor]]
ABSENT = -1e4  # a logit of no probability: its absence costs nothing and has no gradient


def sum_by_layer(values: Tensor, layer: Tensor, layers: int) -> Tensor:
    """Sum `values (M,)` into `(layers,)`; a product, because a scatter is not deterministic on a GPU."""
    member = layer == torch.arange(layers, device=layer.device).unsqueeze(1)
    return member.to(values.dtype) @ values


class Pairs(NamedTuple):
    """Positives with their targets, as a loss rule sees them; everything but `logits` and `boxes` is constant."""

    logits: Tensor  # (M,) of the target's class
    boxes: Tensor  # (M, 4)
    wanted: Tensor  # (M, 4) the targets' boxes
    iou: Tensor  # (M,) of the two
    positives: Assignment
    layers: int
    images: int


def pair_up(output: DecoderOutput, targets: Targets, positives: Assignment, iou_eps: float = 0.0) -> Pairs:
    """Gather what the positives predicted, and what they should have."""
    where = (positives.layer, positives.image, positives.query)
    boxes, wanted = output.boxes[where], targets.boxes[positives.target]
    overlap = iou(cxcywh_to_xyxy(boxes.detach()), cxcywh_to_xyxy(wanted), iou_eps)
    logits = output.logits[(*where, targets.labels[positives.target])]
    layers, images = output.logits.shape[:2]
    return Pairs(logits, boxes, wanted, overlap, positives, layers, images)


class Aim(NamedTuple):
    """What each positive is taught."""

    target: Tensor  # (M,) in [0, 1]: of the logit of the target's class
    weight: Tensor | None = None  # (M,) of its box losses; None: 1


# What to aim at, for pairs whose targets and boxes are known. No gradient flows through it.
AimRule = Callable[[Pairs], Aim]


def certain(pairs: Pairs) -> Aim:
    """The class is there: 1."""
    return Aim(torch.ones_like(pairs.iou))


def overlapping(pairs: Pairs) -> Aim:
    """The IoU with the target (QFL, VFL)."""
    return Aim(pairs.iou)


def best_overlapping(pairs: Pairs) -> Aim:
    """The squared IoU, in each image and layer scaled up so that the best positive aims at 1 (Stable-DINO, PSL)."""
    target = pairs.iou**2
    owner = pairs.positives.layer * pairs.images + pairs.positives.image
    member = owner == torch.arange(pairs.layers * pairs.images, device=owner.device).unsqueeze(1)
    best = (member * target).amax(1) if len(target) else target.new_ones(len(member))
    return Aim(target / best.clamp(min=1e-8)[owner])


def confident_overlapping(pairs: Pairs, alpha: float = 0.25, floor: float = 0.01) -> Aim:
    """The quality `p^alpha IoU^(1 - alpha)`, at least `floor` (IA-BCE without ranks, as real-time DETRs train with)."""
    return Aim(quality(pairs, alpha).clamp(min=floor))


def quality(pairs: Pairs, alpha: float) -> Tensor:
    """`q = p^alpha u^(1 - alpha)` of each pair, p its score and u its IoU: `(M,)` (Align-DETR, Eq. 2)."""
    return pairs.logits.detach().sigmoid() ** alpha * pairs.iou ** (1 - alpha)


def box_terms(pairs: Pairs, normaliser: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> dict[str, Tensor]:
    """L1 and GIoU of the positives, summed over each layer and divided by the number of boxes."""
    terms = {"box": l1_loss(pairs.boxes, pairs.wanted), "giou": giou_loss(pairs.boxes, pairs.wanted, eps)}
    if weight is not None:
        terms = {name: weight * t for name, t in terms.items()}
    return {name: sum_by_layer(t, pairs.positives.layer, pairs.layers) / normaliser for name, t in terms.items()}


@dataclass(frozen=True)
class SetLoss:
    """DETR's set loss with sigmoid classification: positives aim at something, all other entries learn "not there".

    `positive` is the class loss of the positives; the other classes of a positive are no positives. `iou_eps` is for
    comparing with reference codes (`boxes.iou`).
    """

    aim: AimRule = certain
    positive: ClassLoss = focal_loss
    absence: float = 0.75  # weight of the entries that are no positives
    gamma: float = 2.0  # their focal exponent
    iou_eps: float = 0.0

    def __call__(
        self, output: DecoderOutput, targets: Targets, positives: Assignment, normaliser: Tensor
    ) -> dict[str, Tensor]:
        """`class`, `box` and `giou`, each `(L,)`, and `iou_branch` where the detector has one."""
        pairs = pair_up(output, targets, positives, self.iou_eps)
        aim = self.aim(pairs)
        where = (positives.layer, positives.image, positives.query, targets.labels[positives.target])
        others = output.logits.index_put(where, output.logits.new_tensor(ABSENT))
        absent = self.absence * absence_loss(others, self.gamma).sum((1, 2, 3))
        present = sum_by_layer(self.positive(pairs.logits, aim.target), positives.layer, pairs.layers)
        terms = {"class": (absent + present) / normaliser, **box_terms(pairs, normaliser, aim.weight, self.iou_eps)}
        if output.iou_logits is not None:
            predicted = output.iou_logits[positives.layer, positives.image, positives.query]
            errors = bce_loss(predicted, pairs.iou)
            terms["iou_branch"] = sum_by_layer(errors, positives.layer, pairs.layers) / normaliser
        return terms


# Classification by name. Each is trained with one-to-one matching where it comes from; see also `schemes/align.py`.
CLASSIFICATION = {
    "focal": SetLoss(),
    "qfl": SetLoss(overlapping, quality_focal_loss, absence=1.0),
    "vfl": SetLoss(overlapping, varifocal_loss),
    "psl": SetLoss(best_overlapping, lambda x, t: 0.25 * quality_focal_loss(x, t)),
    "ia_bce": SetLoss(confident_overlapping, bce_loss, absence=1.0),
}


def softmax_set_loss(
    output: DecoderOutput, targets: Targets, positives: Assignment, normaliser: Tensor, *, no_object: float = 0.1
) -> dict[str, Tensor]:
    """DETR's own set loss: cross-entropy over the classes and a last "no object" class of weight `no_object`.

    The cross-entropy is a weighted mean over the queries; `normaliser` divides the box terms only.
    """
    classes = output.logits.shape[-1]
    wanted = torch.full(output.logits.shape[:-1], classes - 1, device=output.logits.device)
    wanted[positives.layer, positives.image, positives.query] = targets.labels[positives.target]
    weight = torch.where(wanted == classes - 1, no_object, 1.0).to(output.logits)
    entropy = F.cross_entropy(output.logits.flatten(0, 2), wanted.flatten(), reduction="none").view_as(weight)
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
        """The same for pairs known beforehand: denoising."""
        return replace(self, assign=Known(assignment), weights=self.known_weights or self.weights)

    def proposals(self) -> Supervision:
        """The same for the encoder's proposals, which are one layer."""
        assert isinstance(self.assign, Hungarian)
        return replace(self, assign=self.assign.for_proposals())


def leaving_out(rule: LossRule, unused: Tensor) -> LossRule:
    """`rule` without the queries of slots that hold nothing, `unused (B, N)`: they learn nothing, not even absence."""

    def masked(
        output: DecoderOutput, targets: Targets, assignment: Assignment, normaliser: Tensor
    ) -> dict[str, Tensor]:
        logits = output.logits.masked_fill(unused.unsqueeze(-1), ABSENT)
        return rule(output._replace(logits=logits), targets, assignment, normaliser)

    return masked


@dataclass(frozen=True)
class Task:
    """One block's output with all that its loss needs."""

    name: str
    output: DecoderOutput
    targets: Targets
    supervision: Supervision
    normaliser: Tensor  # scalar: the number of boxes that the sums are divided by
    copies: int = 1
    weight: float = 1.0


def match(tasks: Sequence[Task]) -> list[Assignment]:
    """The assignments of all tasks, with one copy to the host."""
    return assign([Match(t.output, t.targets, t.supervision.assign, t.copies) for t in tasks])


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
        with torch.autocast(task.output.boxes.device.type, enabled=False):
            output = task.output.map(partial(Tensor.to, dtype=task.targets.boxes.dtype))
            terms = task.supervision.rule(output, task.targets, positives, task.normaliser)
        for name, values in terms.items():
            weighted = values * (task.supervision.weights[name] * task.weight)
            losses |= {f"{task.name}/{name}/{layer}": v for layer, v in enumerate(weighted.unbind())}
        metrics[f"{task.name}/iou"] = matched_iou(output, task.targets, positives)
    return losses, metrics


@torch.no_grad()
def matched_iou(output: DecoderOutput, targets: Targets, positives: Assignment) -> Tensor:
    """Mean IoU of the last layer's positives with their targets; not a number where there is none."""
    last = len(output.boxes) - 1
    predicted = output.boxes[positives.layer, positives.image, positives.query]
    overlap = iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(targets.boxes[positives.target]))
    chosen = positives.layer == last
    return (overlap * chosen).sum() / chosen.sum()
