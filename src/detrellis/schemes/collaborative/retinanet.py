"""RetinaNet as an auxiliary head: nine anchors a cell, assigned by their IoU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from detrellis.boxes import giou
from detrellis.schemes.collaborative import assigners
from detrellis.schemes.collaborative.anchors import NINE, nine_anchors
from detrellis.schemes.collaborative.coder import Deltas
from detrellis.schemes.collaborative.dense import (
    DenseBranch,
    DenseOutput,
    assign_usable,
    focal_sum,
    gather_positives,
    mean_positives,
)
from detrellis.schemes.collaborative.scene import Scene

CODER = Deltas()


def assign(
    anchors: Tensor, per_level: Sequence[int], boxes: Tensor, possible: Tensor | None = None
) -> Tensor:
    """Positive from an IoU of 0.5, background below 0.4;
    a target's best anchors are positive at any IoU.
    """
    return assigners.max_iou(
        anchors, boxes, possible, positive=0.5, negative=0.4, minimum=0.0, low_quality=True
    )


class RetinaNet(DenseBranch):
    """Losses: focal `class`; `giou` of the decoded boxes."""

    name = "retinanet"
    each = NINE
    nms = 0.5

    def supervise(
        self, output: DenseOutput, scene: Scene
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """See `DenseBranch`."""
        anchors = nine_anchors(scene)
        owners = assign_usable(scene, anchors, assign)
        positives = gather_positives(scene, owners)
        boxes = CODER.decode(
            anchors[positives.anchor], output.regression[positives.image, positives.anchor]
        )
        count = mean_positives(positives)
        losses = {
            "class": focal_sum(output.logits, owners, positives) / count,
            "giou": 2 * (1 - giou(boxes, positives.box)).sum() / count,
        }
        return losses, anchors, owners

    def boxes(self, output: DenseOutput, scene: Scene) -> Tensor:
        """See `DenseBranch`."""
        return CODER.decode(nine_anchors(scene), output.regression)
