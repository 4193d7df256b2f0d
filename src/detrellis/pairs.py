"""Positives with their targets: what they should learn, and the losses of their boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, iou_and_giou, side_distances
from detrellis.losses import distillation_loss, fine_grained_localization_loss, l1_loss
from detrellis.nn.constants import kept
from detrellis.types import Assignment, DecoderOutput, SideDistributions, Targets


def sum_by_layer(values: Tensor, layer: Tensor, layers: int) -> Tensor:
    """Sum `values (M,)` into `(layers,)`;
    a product, because a scatter is not deterministic on a GPU.
    """
    return members(layer, layers, values.dtype) @ values


def members(layer: Tensor, layers: int, dtype: torch.dtype) -> Tensor:
    """1 where a row of `layer (M,)` is of a layer, `(layers, M)`."""
    return (layer == layer_numbers(layers, layer.device)).to(dtype)


@kept(64)
def layer_numbers(layers: int, device: torch.device) -> Tensor:
    """The layers' numbers, `(layers, 1)`."""
    return torch.arange(layers, device=device).unsqueeze(1)


def last_rows(positives: Assignment, shape: torch.Size) -> Tensor:
    """The last row of each row's query `(M,)`, where `positives` come in the order of layers,
    images and queries of outputs of that `shape (L, B, N, ...)`."""
    _, images, queries = shape[:3]
    place = (positives.layer * images + positives.image) * queries + positives.query
    return torch.searchsorted(place, place, right=True) - 1


class Pairs(NamedTuple):
    """Positives with their targets, as a loss rule sees them;
    gradients flow through `logits`, `boxes` and `giou`.
    """

    logits: Tensor  # (M,) of the target's class
    boxes: Tensor  # (M, 4)
    target_boxes: Tensor  # (M, 4)
    iou: Tensor  # (M,) of predicted and target boxes
    giou: Tensor  # (M,) generalised
    positives: Assignment
    layers: int
    images: int
    labels: Tensor  # (M,) of the targets
    member: Tensor  # (L, M) 1 where a positive is of a layer

    def by_layer(self, values: Tensor) -> Tensor:
        """As `sum_by_layer`: `values (M,)` to `(L,)`."""
        return self.member.to(values.dtype) @ values


class Solved(NamedTuple):
    """A matching problem with its solution."""

    output: DecoderOutput
    targets: Targets
    positives: Assignment


def pair_up(
    output: DecoderOutput, targets: Targets, positives: Assignment, iou_eps: float = 0.0
) -> Pairs:
    """Gather what the positives predicted, and their targets;
    `iou_eps` is added to unions (`boxes.iou`).
    """
    (pairs,) = pair_up_all([Solved(output, targets, positives)], iou_eps)
    return pairs


def pair_up_all(problems: Sequence[Solved], iou_eps: float = 0.0) -> list[Pairs]:
    """As `pair_up`, of several problems, whose boxes are compared in one pass:
    there are few, and every operation costs the same.
    """
    boxes = [o.boxes[p.layer, p.image, p.query] for o, _, p in problems]
    target_boxes = [targets.boxes[p.target] for _, targets, p in problems]
    predicted, wanted = (cxcywh_to_xyxy(_joined(parts)) for parts in (boxes, target_boxes))
    counts = [len(part) for part in boxes]
    overlaps, generalised = (t.split(counts) for t in iou_and_giou(predicted, wanted, iou_eps))
    pairs = []
    for i, (output, targets, rows) in enumerate(problems):
        layers, images = output.logits.shape[:2]
        labels = targets.labels[rows.target]
        logits = output.logits[rows.layer, rows.image, rows.query, labels]
        compared = boxes[i], target_boxes[i], overlaps[i].detach(), generalised[i]
        member = members(rows.layer, layers, logits.dtype)
        pairs.append(Pairs(logits, *compared, rows, layers, images, labels, member))
    return pairs


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


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
    """The squared IoU, scaled up so that the best positive of each image and layer learns 1
    (Stable-DINO, PSL).
    """
    target = pairs.iou**2
    owner = pairs.positives.layer * pairs.images + pairs.positives.image
    member = owner == torch.arange(pairs.layers * pairs.images, device=owner.device).unsqueeze(1)
    best = (member * target).amax(1) if len(target) else target.new_ones(len(member))
    return SoftTarget(target / best.clamp(min=1e-8)[owner])


def giou_target(pairs: Pairs) -> SoftTarget:
    """The GIoU of the predicted box with its target, brought from -1..1 to 0..1 (Rank-DETR)."""
    return SoftTarget((1 + pairs.giou.detach()) / 2)


def quality_target(pairs: Pairs, alpha: float = 0.25, floor: float = 0.01) -> SoftTarget:
    """The quality `p^alpha IoU^(1 - alpha)`,
    at least `floor` (IA-BCE without ranks, as real-time DETRs train with).
    """
    return SoftTarget(quality(pairs, alpha).clamp(min=floor))


def quality(pairs: Pairs, alpha: float) -> Tensor:
    """`q = p^alpha u^(1 - alpha)` of each pair, p its score and u its IoU:
    `(M,)` (Align-DETR, Eq. 2).
    """
    return pairs.logits.detach().sigmoid() ** alpha * pairs.iou ** (1 - alpha)


def box_terms(pairs: Pairs, normaliser: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    """L1 and GIoU of the positives, summed over each layer and divided by the number of boxes."""
    terms = {"box": l1_loss(pairs.boxes, pairs.target_boxes), "giou": 1 - pairs.giou}
    if weight is not None:
        terms = {name: weight * t for name, t in terms.items()}
    return {name: pairs.by_layer(t) / normaliser for name, t in terms.items()}


def fine_grained_localization(
    pairs: Pairs, sides: SideDistributions, normaliser: Tensor, weight: Tensor | None = None
) -> Tensor:
    """FGL (D-FINE, Eq. 6): each side's distribution learns where the target's side lies,
    by the IoU; `(L,)`.

    `weight (M,)` is one more of each positive; None: 1.
    """
    where = (pairs.positives.layer, pairs.positives.image, pairs.positives.query)
    distances = side_distances(sides.base[where], pairs.target_boxes, sides.scale)
    bins = sides.bins.to(distances.dtype)
    losses = fine_grained_localization_loss(
        sides.logits[where].flatten(0, 1), distances.flatten(), bins
    )
    losses = losses.unflatten(0, (-1, 4)).sum(-1) * pairs.iou * (1 if weight is None else weight)
    return pairs.by_layer(losses) / normaliser


def decoupled_distillation(pairs: Pairs, sides: SideDistributions, logits: Tensor) -> Tensor:
    """DDF (D-FINE, Eq. 7): the distributions of all layers but the last learn from those of the
    last; `(L - 1,)`.

    Positives weigh by their IoU, other queries by the last layer's best score of the class
    `logits (L, B, N, C)`; the two means are averaged by the square roots of how many there are.
    """
    layer, image, query = pairs.positives.layer, pairs.positives.image, pairs.positives.query
    losses = distillation_loss(sides.logits[:-1], sides.logits[-1:]).mean(-1)  # (L - 1, B, N)
    # The weights, and who is a positive; the last layer's rows are cut off again.
    scores = logits[-1:].detach().sigmoid().amax(-1).expand(logits.shape[:-1])
    weights = scores.index_put((layer, image, query), pairs.iou)[:-1]
    positive = torch.zeros_like(scores).index_put((layer, image, query), scores.new_ones(()))[:-1]
    parts = torch.stack([positive, 1 - positive])
    counts = parts.sum((2, 3))
    means = (parts * weights * losses).sum((2, 3)) / counts.clamp(min=1)
    return (means * counts.sqrt()).sum(0) / counts.sqrt().sum(0)
