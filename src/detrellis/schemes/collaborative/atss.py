"""ATSS as an auxiliary head: one anchor a cell, adaptive selection of positives, centerness."""

from __future__ import annotations

from torch import Tensor

from detrellis.boxes import giou
from detrellis.distributed import reduce_mean
from detrellis.losses import bce_loss
from detrellis.schemes.collaborative import assigners
from detrellis.schemes.collaborative.anchors import square_anchors
from detrellis.schemes.collaborative.coder import Deltas, centerness, centres, sides
from detrellis.schemes.collaborative.dense import (
    DenseBranch,
    DenseOutput,
    assign_usable,
    focal_sum,
    gather_positives,
    mean_positives,
)
from detrellis.schemes.collaborative.scene import Scene

CODER = Deltas(0.1, 0.2)


class ATSS(DenseBranch):
    """Losses: focal `class`; `giou` of the decoded boxes,
    weighted by the centerness they should have; `centerness`.
    """

    name = "atss"
    quality = True

    def supervise(
        self, output: DenseOutput, scene: Scene
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """See `DenseBranch`."""
        anchors = square_anchors(scene)
        owners = assign_usable(scene, anchors, assigners.atss)
        positives = gather_positives(scene, owners)
        where, anchor = (positives.image, positives.anchor), anchors[positives.anchor]
        target = centerness(sides(centres(anchor), positives.box))
        boxes = CODER.decode(anchor, output.regression[where])
        count = mean_positives(positives)
        assert output.quality is not None
        losses = {
            "class": focal_sum(output.logits, owners, positives) / count,
            "giou": 2
            * (target * (1 - giou(boxes, positives.box))).sum()
            / reduce_mean(target.sum()).clamp(min=1),
            "centerness": bce_loss(output.quality[where], target).sum() / count,
        }
        return losses, anchors, owners

    def boxes(self, output: DenseOutput, scene: Scene) -> Tensor:
        """See `DenseBranch`."""
        return CODER.decode(square_anchors(scene), output.regression)
