"""Generalized Focal Loss as an auxiliary head: ATSS' assignment, scores that aim at the IoU, distributions of sides."""

from __future__ import annotations

import torch
from torch import Tensor

from detrellis.boxes import giou, iou
from detrellis.losses import distribution_focal_loss, quality_focal_loss
from detrellis.schemes.base import rank_mean
from detrellis.schemes.collaborative import assigners
from detrellis.schemes.collaborative.anchors import grid_anchors, spread
from detrellis.schemes.collaborative.branch import Branch
from detrellis.schemes.collaborative.coder import centres, from_sides, sides
from detrellis.schemes.collaborative.dense import (
    DenseHead,
    DenseOutput,
    absence_sum,
    assign_usable,
    mean_positives,
    positives,
    report,
    select_dense,
)
from detrellis.schemes.collaborative.scene import Draw, Found, Predictions, Scene

BINS = 17  # a side is 0 to 16 strides away
FARTHEST = BINS - 1 - 0.1


def distances(logits: Tensor) -> Tensor:
    """The mean of the distribution of each side: `(..., 4 * BINS)` to `(..., 4)`, in strides."""
    shares: Tensor = logits.unflatten(-1, (4, BINS)).softmax(-1)
    return (shares * torch.arange(BINS, device=shares.device)).sum(-1)


class GFL(Branch):
    """Losses: quality focal `class`; `giou` and `dfl`, both weighted by the score that the anchor has."""

    name = "gfl"

    def __init__(self, width: int, classes: int, levels: int, *, convolutions: int = 1) -> None:
        super().__init__()
        self.head = DenseHead(width, classes, levels, numbers=4 * BINS, convolutions=convolutions)

    def forward(self, scene: Scene, draw: Draw) -> tuple[dict[str, Tensor], list[Found]]:
        """See `Branch`."""
        output = self.head(scene.maps)
        losses, anchors, owners = self.teach(output, scene)
        return losses, report(scene, anchors, owners, output)

    def teach(self, output: DenseOutput, scene: Scene) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses, anchors `(A, 4)` and owners `(B, A)`."""
        anchors, strides = self.anchors(scene)
        owners = assign_usable(scene, anchors, assigners.atss)
        found = positives(scene, owners)
        where, points, stride = (found.image, found.anchor), centres(anchors[found.anchor]), strides[found.anchor]
        bins = output.regression[where]
        boxes = from_sides(points, distances(bins) * stride)
        present = quality_focal_loss(output.logits[(*where, found.label)], iou(boxes.detach(), found.box)).sum()
        wanted = (sides(points, found.box) / stride).clamp(0, FARTHEST)
        dfl = distribution_focal_loss(bins.view(-1, BINS), wanted.flatten()).view(-1, 4).mean(-1)
        score = output.logits[where].detach().sigmoid().amax(-1)
        total = rank_mean(score.sum()).clamp(min=1)
        losses = {
            "class": (present + absence_sum(output.logits, owners, found)) / mean_positives(found),
            "giou": 2 * (score * (1 - giou(boxes, found.box))).sum() / total,
            "dfl": 0.25 * (score * dfl).sum() / total,
        }
        return losses, anchors, owners

    def anchors(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """One square of eight strides a cell, `(A, 4)`, and its stride `(A, 1)`."""
        anchors = grid_anchors(scene.shapes, scene.strides, scene.sizes)
        return anchors, spread(scene.strides, [h * w for h, w in scene.shapes], anchors).unsqueeze(-1)

    @torch.no_grad()
    def predict(self, scene: Scene) -> list[Predictions]:
        """See `Branch`."""
        output = self.head(scene.maps)
        anchors, strides = self.anchors(scene)
        boxes = from_sides(centres(anchors), distances(output.regression) * strides)
        return select_dense(scene, output.logits.sigmoid(), boxes, nms=0.6)
