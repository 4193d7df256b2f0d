"""ATSS as an auxiliary head: one anchor a cell, adaptive selection of positives, centerness."""

from __future__ import annotations

import torch
from torch import Tensor

from detrellis.boxes import giou
from detrellis.losses import bce_loss
from detrellis.schemes.base import rank_mean
from detrellis.schemes.collaborative import assigners
from detrellis.schemes.collaborative.anchors import grid_anchors
from detrellis.schemes.collaborative.branch import Branch
from detrellis.schemes.collaborative.coder import Deltas, centerness, centres, sides
from detrellis.schemes.collaborative.dense import (
    DenseHead,
    DenseOutput,
    assign_usable,
    focal_sum,
    mean_positives,
    positives,
    report,
    select_dense,
)
from detrellis.schemes.collaborative.scene import Draw, Found, Predictions, Scene

CODER = Deltas(0.1, 0.2)


class ATSS(Branch):
    """Losses: focal `class`; `giou` of the decoded boxes, weighted by the centerness they should have; `centerness`."""

    name = "atss"

    def __init__(self, width: int, classes: int, levels: int, *, convolutions: int = 1) -> None:
        super().__init__()
        self.head = DenseHead(width, classes, levels, quality=True, convolutions=convolutions)

    def forward(self, scene: Scene, draw: Draw) -> tuple[dict[str, Tensor], list[Found]]:
        """See `Branch`."""
        output = self.head(scene.maps)
        losses, anchors, owners = self.teach(output, scene)
        return losses, report(scene, anchors, owners, output)

    def teach(self, output: DenseOutput, scene: Scene) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses, anchors `(A, 4)` and owners `(B, A)`."""
        anchors = self.anchors(scene)
        owners = assign_usable(scene, anchors, assigners.atss)
        found = positives(scene, owners)
        where, own = (found.image, found.anchor), anchors[found.anchor]
        wanted = centerness(sides(centres(own), found.box))
        boxes = CODER.decode(own, output.regression[where])
        count = mean_positives(found)
        assert output.quality is not None
        losses = {
            "class": focal_sum(output.logits, owners, found) / count,
            "giou": 2 * (wanted * (1 - giou(boxes, found.box))).sum() / rank_mean(wanted.sum()).clamp(min=1),
            "centerness": bce_loss(output.quality[where], wanted).sum() / count,
        }
        return losses, anchors, owners

    def anchors(self, scene: Scene) -> Tensor:
        """One square of eight strides a cell: `(A, 4)`."""
        return grid_anchors(scene.shapes, scene.strides, scene.sizes)

    @torch.no_grad()
    def predict(self, scene: Scene) -> list[Predictions]:
        """See `Branch`."""
        output = self.head(scene.maps)
        assert output.quality is not None
        scores = output.logits.sigmoid() * output.quality.sigmoid().unsqueeze(-1)
        return select_dense(scene, scores, CODER.decode(self.anchors(scene), output.regression), nms=0.6)
