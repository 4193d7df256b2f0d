"""What is exported: a detector from pictures to its outputs,
with the preprocessing that it was trained with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.data.batch import Normalise
from detrellis.detector import Detector
from detrellis.exported import IOU
from detrellis.types import DecoderOutput, ImageBatch

OUTPUTS = ("logits", "boxes")
DETECTIONS = ("scores", "labels", "corners")


class ExportGraph(nn.Module):
    """A detector that takes pictures `(B, 3, h, w)` in RGB from 0 to 1,
    resized as its recipe says, of one size.

    It normalises them and, where the recipe has a `canvas` (height, width), pads them to it. It
    returns `logits (B, N, C)` and `boxes (B, N, 4)`, `(cx, cy, w, h)` relative to the picture, and
    `iou_logits (B, N)` of an IoU branch; with `detections` also, ranked by score, `scores`,
    `labels` and `corners`, `(B, K)` twice and `(B, K, 4)`, the last ones `(x1, y1, x2, y2)`
    relative to the picture.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        detector: Detector,
        normalise: Normalise,
        canvas: tuple[int, int] | None,
        *,
        detections: bool = False,
    ) -> None:
        super().__init__()
        self.detector, self.canvas, self.detections = detector, canvas, detections
        self.register_buffer("mean", torch.tensor(normalise.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(normalise.std).view(3, 1, 1), persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs."""
        branch = () if self.detector.postprocess.iou_branch == "none" else (IOU,)
        return (*OUTPUTS, *branch, *(DETECTIONS if self.detections else ()))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of `names`."""
        output: DecoderOutput = self.detector(self._prepared(images))
        outputs = [output.logits[-1], output.boxes[-1]]
        if output.iou_logits is not None:
            outputs.append(output.iou_logits[-1])
        if self.detections:
            scores, labels, query = self.detector.postprocess.ranked(output)
            corners = cxcywh_to_xyxy(
                output.boxes[-1].gather(1, query.unsqueeze(-1).expand(-1, -1, 4))
            )
            outputs += [scores, labels, corners.clamp(0, 1)]
        return tuple(outputs)

    def _prepared(self, images: Tensor) -> ImageBatch:
        pixels = (images - self.mean) / self.std
        if self.canvas is None:
            return ImageBatch(pixels)
        (height, width), (rows, columns) = pixels.shape[-2:], self.canvas
        return ImageBatch(pixels).padded(rows - height, columns - width)
