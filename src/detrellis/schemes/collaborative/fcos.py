"""FCOS as an auxiliary head: no anchors;
points near a target's centre learn the distances to its sides, in strides.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis.boxes import giou
from detrellis.distributed import reduce_mean
from detrellis.losses import bce_loss
from detrellis.schemes.collaborative import assigners
from detrellis.schemes.collaborative.anchors import cell_strides, grid_points
from detrellis.schemes.collaborative.coder import centerness, from_sides, sides
from detrellis.schemes.collaborative.dense import (
    DenseBranch,
    DenseOutput,
    assign_usable,
    focal_sum,
    gather_positives,
)
from detrellis.schemes.collaborative.scene import Scene


class FCOS(DenseBranch):
    """Losses: focal `class`; `giou`,
    weighted by the centerness that the point has; `centerness`.
    """

    name = "fcos"
    quality = True
    nms = 0.5

    def output(self, scene: Scene) -> DenseOutput:
        """The head's output, with distances that are not negative."""
        output = super().output(scene)
        return output._replace(regression=F.relu(output.regression))

    def supervise(
        self, output: DenseOutput, scene: Scene
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """See `DenseBranch`; boxes of eight strides around the points."""
        points, strides = self.points(scene)
        owners = assign_usable(scene, points, partial(assigners.fcos, strides=scene.strides))
        positives = gather_positives(scene, owners)
        where, point = (positives.image, positives.anchor), points[positives.anchor]
        target = centerness(sides(point, positives.box))
        boxes = from_sides(point, output.regression[where] * strides[positives.anchor])
        count = reduce_mean(positives.per_image().sum()).clamp(min=1)
        assert output.quality is not None
        losses = {
            "class": focal_sum(output.logits, owners, positives) / count,
            "giou": 2
            * (target * (1 - giou(boxes, positives.box))).sum()
            / reduce_mean(target.sum()).clamp(min=1),
            "centerness": bce_loss(output.quality[where], target).sum() / count,
        }
        return losses, torch.cat([points - 4 * strides, points + 4 * strides], dim=-1), owners

    def points(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """The cells' centres `(A, 2)` and strides `(A, 1)`."""
        points = grid_points(scene.shapes, scene.strides, scene.sizes, offset=0.5)
        return points, cell_strides(scene)

    def boxes(self, output: DenseOutput, scene: Scene) -> Tensor:
        """See `DenseBranch`."""
        points, strides = self.points(scene)
        return from_sides(points, output.regression * strides)
