"""PAA as an auxiliary head: a target's positives are its anchors of low loss,
by a mixture of two Gaussians.

Of the anchors that overlap a target, those with the lowest losses on each level are candidates; the
mixture is fitted to their losses, and what belongs to the lower component is positive, up to where
it is densest (Kim and Lee, 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detrellis.boxes import giou, iou
from detrellis.distributed import reduce_mean
from detrellis.losses import bce_loss, focal_negative, focal_positive
from detrellis.schemes.collaborative import assigners
from detrellis.schemes.collaborative.anchors import per_cell, square_anchors
from detrellis.schemes.collaborative.coder import Deltas
from detrellis.schemes.collaborative.dense import (
    DenseBranch,
    DenseOutput,
    Positives,
    assign_usable,
    focal_sum,
    gather_positives,
)
from detrellis.schemes.collaborative.scene import Scene
from detrellis.schemes.ranks import rank
from detrellis.set_loss import ABSENT

CODER = Deltas(0.1, 0.2)
GIOU = 1.3  # weight of the GIoU, in the loss and in the candidates' order
PER_LEVEL = 9  # most candidates of a target on a level


class PAA(DenseBranch):
    """Losses: focal `class`; `giou`, weighted by the IoU that the decoded box has;
    `iou`, which predicts that.
    """

    name = "paa"
    quality = True

    def supervise(
        self, output: DenseOutput, scene: Scene
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """See `DenseBranch`."""
        anchors = square_anchors(scene)
        owners = keep_likely(output, scene, anchors, assign_usable(scene, anchors, overlapping))
        positives = gather_positives(scene, owners)
        where = (positives.image, positives.anchor)
        boxes = CODER.decode(anchors[positives.anchor], output.regression[where])
        overlap = iou(boxes.detach(), positives.box)
        count, total = reduce_mean(positives.per_image().sum()), reduce_mean(overlap.sum())
        assert output.quality is not None
        losses = {
            "class": focal_sum(output.logits, owners, positives)
            / count.clamp(min=positives.images),
            "giou": GIOU
            * (overlap * (1 - giou(boxes, positives.box))).sum()
            / total.clamp(min=1e-6),
            "iou": 0.5 * bce_loss(output.quality[where], overlap).sum() / count.clamp(min=1),
        }
        return losses, anchors, owners

    def boxes(self, output: DenseOutput, scene: Scene) -> Tensor:
        """See `DenseBranch`."""
        return CODER.decode(square_anchors(scene), output.regression)

    def scores(self, output: DenseOutput) -> Tensor:
        """The root of the usual score."""
        return super().scores(output).sqrt()


def overlapping(
    anchors: Tensor, per_level: Sequence[int], boxes: Tensor, possible: Tensor | None = None
) -> Tensor:
    """All anchors with an IoU of 0.1 or more, and a target's best ones at any IoU: their owners."""
    return assigners.max_iou(
        anchors, boxes, possible, positive=0.1, negative=0.1, minimum=0.0, low_quality=True
    )


@torch.no_grad()
def keep_likely(output: DenseOutput, scene: Scene, anchors: Tensor, owners: Tensor) -> Tensor:
    """The owners `(B, A)` with only the likely ones of the overlapping anchors;
    the others become background.
    """
    positives = gather_positives(scene, owners)
    loss = candidate_loss(output, anchors, positives)
    # Candidates: those of the lowest losses among a target's anchors on each level.
    levels = len(scene.maps)
    level = per_cell(range(levels), [h * w for h, w in scene.shapes], positives.anchor)[
        positives.anchor
    ]
    chosen = rank(-loss, positives.target * levels + level) < PER_LEVEL
    image, anchor, target, loss = (
        t[chosen] for t in (positives.image, positives.anchor, positives.target, loss)
    )
    # A row for each target, its candidates' losses in ascending order.
    place = rank(-loss, target)
    rows = loss.new_full((sum(map(len, scene.boxes)), levels * PER_LEVEL), float("nan"))
    rows[target, place] = loss
    # On the host: many steps of few operations on few numbers.
    likely = likely_positives(rows.cpu().double()).to(rows.device)[target, place]
    # All others become background.
    kept = owners.clamp(max=assigners.BACKGROUND)
    kept[image[likely], anchor[likely]] = owners[image[likely], anchor[likely]]
    return kept


def candidate_loss(output: DenseOutput, anchors: Tensor, positives: Positives) -> Tensor:
    """Focal loss over all classes and GIoU loss of each anchor with its target: `(P,)`."""
    where = (positives.image, positives.anchor)
    logits = output.logits[where]
    present = focal_positive(logits.gather(1, positives.label.unsqueeze(1))).squeeze(1)
    absent = focal_negative(logits.scatter(1, positives.label.unsqueeze(1), ABSENT)).sum(1)
    boxes = CODER.decode(anchors[positives.anchor], output.regression[where])
    return 0.25 * present + 0.75 * absent + GIOU * (1 - giou(boxes, positives.box))


class Mixture(NamedTuple):
    """Two Gaussians for each of `R` rows, `(R, 2)` each; the first begins at the lowest value."""

    weight: Tensor
    mean: Tensor
    variance: Tensor

    def log_density(self, x: Tensor) -> Tensor:
        """The logarithm of each component's density times its weight at `x (R, K)`: `(R, K, 2)`."""
        weight, mean, variance = (t.unsqueeze(1) for t in self)
        return (
            weight.log()
            - ((x.unsqueeze(-1) - mean) ** 2 / variance + (2 * math.pi * variance).log()) / 2
        )


def fit_mixture(x: Tensor, member: Tensor) -> Mixture:
    """Expectation maximisation on the values `x (R, K)` that are `member (R, K)`,
    at least one in each row.

    It starts from the least and the greatest value, equal weights and variances of 1, and ends when
    a row's mean log-likelihood changes by less than 1e-3, after 100 times at most; 1e-6 is added to
    variances.
    """
    # Start: a component at either end.
    ends = (
        torch.where(member, x, float("inf")).amin(1),
        torch.where(member, x, float("-inf")).amax(1),
    )
    mean = torch.stack(ends, dim=1)
    mixture = Mixture(torch.full_like(mean, 0.5), mean, torch.ones_like(mean))
    likelihood = mean.new_full((len(mean),), float("-inf"))
    moving = torch.ones_like(likelihood, dtype=torch.bool)
    for _ in range(100):
        if not moving.any():
            break
        # Expectation: how far each value belongs to each component. (R, K, 2)
        log = mixture.log_density(x)
        density = log.logsumexp(-1)
        part = (log - density.unsqueeze(-1)).exp() * member.unsqueeze(-1)
        # Maximisation, in the rows that still change.
        count = part.sum(1) + 10 * torch.finfo(x.dtype).eps
        mean = (part * x.unsqueeze(-1)).sum(1) / count
        variance = (part * (x.unsqueeze(-1) - mean.unsqueeze(1)) ** 2).sum(1) / count + 1e-6
        new = Mixture(count / count.sum(1, keepdim=True), mean, variance)
        mixture = Mixture(
            *(torch.where(moving.unsqueeze(1), n, o) for n, o in zip(new, mixture, strict=True))
        )
        before, likelihood = likelihood, torch.where(member, density, 0.0).sum(1) / member.sum(1)
        moving &= (likelihood - before).abs() >= 1e-3
    return mixture


def likely_positives(losses: Tensor) -> Tensor:
    """Which of each row's `losses (R, K)`, ascending and NaN behind, are positive;
    none where there is only one.
    """
    # Rows of two candidates and more; NaN is filled up with a row's first value, which counts
    # nowhere.
    member = losses.isfinite()
    member &= member.sum(1, keepdim=True) > 1
    rows = member.any(1)
    x, member = torch.where(member, losses, losses[:, :1])[rows], member[rows]
    log = fit_mixture(x, member).log_density(x)
    # Those of the lower component, up to where it is densest.
    lower = member & (log[..., 0] >= log[..., 1])
    density = torch.where(lower, log.logsumexp(-1), float("-inf"))
    # A component of two members is as dense at one as at the other: the first, whatever the
    # rounding.
    densest = (density >= density.amax(1, keepdim=True) - 1e-6).int().argmax(1, keepdim=True)
    likely = torch.zeros_like(losses, dtype=torch.bool)
    likely[rows] = lower & (torch.arange(x.shape[1], device=x.device) <= densest)
    return likely
