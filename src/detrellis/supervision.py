"""How a block of queries is taught: which query learns which target, and by what loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, iou
from detrellis.losses import giou_loss, l1_loss, sigmoid_focal_loss
from detrellis.matching import Assign, Hungarian, Match, assign
from detrellis.types import Assignment, DecoderOutput, Targets

# (output, targets, assignment, normaliser) to unweighted terms, each (L,): one value a decoder layer.
LossRule = Callable[[DecoderOutput, Targets, Assignment, Tensor], dict[str, Tensor]]


def sum_by_layer(values: Tensor, layer: Tensor, layers: int) -> Tensor:
    """Sum `values (M,)` into `(layers,)`; a product, because a scatter is not deterministic on a GPU."""
    member = layer == torch.arange(layers, device=layer.device).unsqueeze(1)
    return member.to(values.dtype) @ values


def box_terms(output: DecoderOutput, targets: Targets, positives: Assignment, normaliser: Tensor) -> dict[str, Tensor]:
    """L1 and GIoU of the positives, summed over each layer and divided by the number of boxes."""
    predicted = output.boxes[positives.layer, positives.image, positives.query]
    wanted = targets.boxes[positives.target]
    layers = len(output.boxes)
    terms = {"box": l1_loss(predicted, wanted), "giou": giou_loss(predicted, wanted)}
    return {name: sum_by_layer(t, positives.layer, layers) / normaliser for name, t in terms.items()}


def focal_set_loss(
    output: DecoderOutput, targets: Targets, positives: Assignment, normaliser: Tensor
) -> dict[str, Tensor]:
    """DETR's set loss with focal classification: every query that is not a positive learns "no object".

    Returns `class`, `box` and `giou`, each `(L,)`.
    """
    wanted = torch.zeros_like(output.logits)
    wanted[positives.layer, positives.image, positives.query, targets.labels[positives.target]] = 1
    classes = sigmoid_focal_loss(output.logits, wanted).sum((1, 2, 3)) / normaliser
    return {"class": classes, **box_terms(output, targets, positives, normaliser)}


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
    return {"class": mean, **box_terms(output, targets, positives, normaliser)}


@dataclass(frozen=True)
class Supervision:
    """Assignment, loss rule, and the weight of each of the rule's terms."""

    assign: Assign = field(default_factory=Hungarian)
    rule: LossRule = focal_set_loss
    weights: Mapping[str, float] = field(default_factory=lambda: {"class": 1.0, "box": 5.0, "giou": 2.0})


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


def supervise(tasks: Sequence[Task]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weighted losses `"block/term/layer"` of all tasks, and metrics; all are matched with one host copy.

    Losses and boxes are computed in float32 or better whatever autocast says.
    """
    assignments = assign([Match(t.output, t.targets, t.supervision.assign, t.copies) for t in tasks])
    losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    for task, positives in zip(tasks, assignments, strict=True):
        with torch.autocast(task.output.boxes.device.type, enabled=False):
            output = DecoderOutput(*(t.to(task.targets.boxes.dtype) for t in task.output))
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
