"""RetinaNet as an auxiliary head: nine anchors a cell, assigned by their IoU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detrellis.boxes import giou
from detrellis.schemes.collaborative import assigners
from detrellis.schemes.collaborative.anchors import grid_anchors
from detrellis.schemes.collaborative.branch import Branch
from detrellis.schemes.collaborative.coder import Deltas
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

CODER = Deltas()
RATIOS = (0.5, 1.0, 2.0)
SCALES = tuple(4 * 2 ** (k / 3) for k in range(3))


def assign(anchors: Tensor, per_level: Sequence[int], boxes: Tensor) -> Tensor:
    """Positive from an IoU of 0.5, background below 0.4; a target's best anchors are positive at any IoU."""
    return assigners.max_iou(anchors, boxes, positive=0.5, negative=0.4, minimum=0.0, low_quality=True)


class RetinaNet(Branch):
    """Losses: focal `class`; `giou` of the decoded boxes."""

    name = "retinanet"

    def __init__(self, width: int, classes: int, levels: int, *, convolutions: int = 1) -> None:
        super().__init__()
        anchors = len(RATIOS) * len(SCALES)
        self.head = DenseHead(width, classes, levels, anchors=anchors, convolutions=convolutions)

    def forward(self, scene: Scene, draw: Draw) -> tuple[dict[str, Tensor], list[Found]]:
        """See `Branch`."""
        output = self.head(scene.maps)
        losses, anchors, owners = self.teach(output, scene)
        return losses, report(scene, anchors, owners, output)

    def teach(self, output: DenseOutput, scene: Scene) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses, anchors `(A, 4)` and owners `(B, A)`."""
        anchors = self.anchors(scene)
        owners = assign_usable(scene, anchors, assign)
        found = positives(scene, owners)
        boxes = CODER.decode(anchors[found.anchor], output.regression[found.image, found.anchor])
        count = mean_positives(found)
        losses = {
            "class": focal_sum(output.logits, owners, found) / count,
            "giou": 2 * (1 - giou(boxes, found.box)).sum() / count,
        }
        return losses, anchors, owners

    def anchors(self, scene: Scene) -> Tensor:
        """Three shapes of three sizes a cell: `(A, 4)`."""
        return grid_anchors(scene.shapes, scene.strides, scene.sizes, RATIOS, SCALES)

    @torch.no_grad()
    def predict(self, scene: Scene) -> list[Predictions]:
        """See `Branch`."""
        output = self.head(scene.maps)
        boxes = CODER.decode(self.anchors(scene), output.regression)
        return select_dense(scene, output.logits.sigmoid(), boxes, nms=0.5)
