"""Generalized Focal Loss as an auxiliary head: ATSS' assignment, scores that aim at the IoU, distributions of sides."""

from __future__ import annotations

import torch
from torch import Tensor

from detrellis.boxes import giou, iou
from detrellis.distributed import reduce_mean
from detrellis.losses import distribution_focal_loss, quality_focal_loss
from detrellis.schemes.collaborative import assigners
from detrellis.schemes.collaborative.anchors import cell_strides, square_anchors
from detrellis.schemes.collaborative.coder import centres, from_sides, sides
from detrellis.schemes.collaborative.dense import (
    DenseBranch,
    DenseOutput,
    absence_sum,
    assign_usable,
    mean_positives,
    positives,
)
from detrellis.schemes.collaborative.scene import Scene

BINS = 17  # a side is 0 to 16 strides away
FARTHEST = BINS - 1 - 0.1


def distances(logits: Tensor) -> Tensor:
    """The mean of the distribution of each side: `(..., 4 * BINS)` to `(..., 4)`, in strides."""
    shares: Tensor = logits.unflatten(-1, (4, BINS)).softmax(-1)
    return (shares * torch.arange(BINS, device=shares.device)).sum(-1)


class GFL(DenseBranch):
    """Losses: quality focal `class`; `giou` and `dfl`, both weighted by the score that the anchor has."""

    name = "gfl"
    numbers = 4 * BINS

    def teach(self, output: DenseOutput, scene: Scene) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """See `DenseBranch`."""
        anchors, strides = square_anchors(scene), cell_strides(scene)
        owners = assign_usable(scene, anchors, assigners.atss)
        found = positives(scene, owners)
        where, points, stride = (found.image, found.anchor), centres(anchors[found.anchor]), strides[found.anchor]
        bins = output.regression[where]
        boxes = from_sides(points, distances(bins) * stride)
        present = quality_focal_loss(output.logits[(*where, found.label)], iou(boxes.detach(), found.box)).sum()
        wanted = (sides(points, found.box) / stride).clamp(0, FARTHEST)
        dfl = distribution_focal_loss(bins.view(-1, BINS), wanted.flatten()).view(-1, 4).mean(-1)
        score = output.logits[where].detach().sigmoid().amax(-1)
        total = reduce_mean(score.sum()).clamp(min=1)
        losses = {
            "class": (present + absence_sum(output.logits, owners, found)) / mean_positives(found),
            "giou": 2 * (score * (1 - giou(boxes, found.box))).sum() / total,
            "dfl": 0.25 * (score * dfl).sum() / total,
        }
        return losses, anchors, owners

    def detect(self, output: DenseOutput, scene: Scene) -> tuple[Tensor, Tensor]:
        """See `DenseBranch`."""
        points, strides = centres(square_anchors(scene)), cell_strides(scene)
        return output.logits.sigmoid(), from_sides(points, distances(output.regression) * strides)
