"""Generalized Focal Loss as an auxiliary head:
ATSS' assignment, scores that aim at the IoU, distributions of sides.
"""

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
    gather_positives,
    mean_positives,
)
from detrellis.schemes.collaborative.scene import Scene

BINS = 17  # a side is 0 to 16 strides away
FARTHEST = BINS - 1 - 0.1


def distances(logits: Tensor) -> Tensor:
    """The mean of the distribution of each side: `(..., 4 * BINS)` to `(..., 4)`, in strides."""
    p: Tensor = logits.unflatten(-1, (4, BINS)).softmax(-1)
    return (p * torch.arange(BINS, device=p.device)).sum(-1)


class GFL(DenseBranch):
    """Losses: quality focal `class`;
    `giou` and `dfl`, both weighted by the score that the anchor has.
    """

    name = "gfl"
    box_outputs = 4 * BINS

    def supervise(
        self, output: DenseOutput, scene: Scene
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """See `DenseBranch`."""
        anchors, strides = square_anchors(scene), cell_strides(scene)
        owners = assign_usable(scene, anchors, assigners.atss)
        positives = gather_positives(scene, owners)
        # What the positives predict: a distribution over bins for each side.
        where = (positives.image, positives.anchor)
        points, stride = centres(anchors[positives.anchor]), strides[positives.anchor]
        bins = output.regression[where]
        boxes = from_sides(points, distances(bins) * stride)
        # Scores learn the IoU, distributions the distances.
        present = quality_focal_loss(
            output.logits[(*where, positives.label)], iou(boxes.detach(), positives.box)
        ).sum()
        target = (sides(points, positives.box) / stride).clamp(0, FARTHEST)
        dfl = distribution_focal_loss(bins.view(-1, BINS), target.flatten()).view(-1, 4).mean(-1)
        # Box losses count with the score.
        score = output.logits[where].detach().sigmoid().amax(-1)
        total = reduce_mean(score.sum()).clamp(min=1)
        losses = {
            "class": (present + absence_sum(output.logits, owners, positives))
            / mean_positives(positives),
            "giou": 2 * (score * (1 - giou(boxes, positives.box))).sum() / total,
            "dfl": 0.25 * (score * dfl).sum() / total,
        }
        return losses, anchors, owners

    def boxes(self, output: DenseOutput, scene: Scene) -> Tensor:
        """See `DenseBranch`."""
        points, strides = centres(square_anchors(scene)), cell_strides(scene)
        return from_sides(points, distances(output.regression) * strides)
