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
    mean_positives,
    positives,
)
from detrellis.schemes.collaborative.scene import Scene

CODER = Deltas(0.1, 0.2)


class ATSS(DenseBranch):
    """Losses: focal `class`; `giou` of the decoded boxes, weighted by the centerness they should have; `centerness`."""

    name = "atss"
    quality = True

    def teach(self, output: DenseOutput, scene: Scene) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """See `DenseBranch`."""
        anchors = square_anchors(scene)
        owners = assign_usable(scene, anchors, assigners.atss)
        found = positives(scene, owners)
        where, own = (found.image, found.anchor), anchors[found.anchor]
        wanted = centerness(sides(centres(own), found.box))
        boxes = CODER.decode(own, output.regression[where])
        count = mean_positives(found)
        assert output.quality is not None
        losses = {
            "class": focal_sum(output.logits, owners, found) / count,
            "giou": 2 * (wanted * (1 - giou(boxes, found.box))).sum() / reduce_mean(wanted.sum()).clamp(min=1),
            "centerness": bce_loss(output.quality[where], wanted).sum() / count,
        }
        return losses, anchors, owners

    def detect(self, output: DenseOutput, scene: Scene) -> tuple[Tensor, Tensor]:
        """See `DenseBranch`."""
        assert output.quality is not None
        scores = output.logits.sigmoid() * output.quality.sigmoid().unsqueeze(-1)
        return scores, CODER.decode(square_anchors(scene), output.regression)
