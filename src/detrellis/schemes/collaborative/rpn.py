"""The region proposal network of Faster R-CNN (Ren et al., 2015):
which anchors hold an object of any class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detrellis.losses import bce_loss, l1_loss
from detrellis.nn.kernels.linear import linear
from detrellis.postprocess import nms
from detrellis.schemes.collaborative.anchors import NINE, usable_cells
from detrellis.schemes.collaborative.assigners import BACKGROUND, IGNORED, max_iou
from detrellis.schemes.collaborative.coder import Deltas, clip
from detrellis.schemes.collaborative.dense import (
    DenseOutput,
    assign_usable,
    by_cell,
    conv,
    gather_positives,
    precise,
)
from detrellis.schemes.collaborative.scene import Draw, Scene, on_host, rows_where

CODER = Deltas()
SAMPLES = 256  # anchors of an image that learn, up to half of them positive


class RPN(nn.Module):
    """A convolution, then one class and one box for each of nine anchors a cell;
    shared by all levels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower = conv(width, width)
        self.classify, self.regress = nn.Conv2d(width, NINE, 1), nn.Conv2d(width, 4 * NINE, 1)
        for layer in (self.classify, self.regress):
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> DenseOutput:
        """Maps `(B, D, H, W)` of the levels to one logit and the deltas of all anchors."""
        # A 1x1 convolution is a linear layer of each cell: one of all levels' cells.
        cells = by_cell([self.tower(m) for m in maps]).relu_()
        logits, deltas = (
            precise(linear(cells, layer.weight.flatten(1), layer.bias).unflatten(2, (NINE, -1)))
            for layer in (self.classify, self.regress)
        )
        return DenseOutput(logits.flatten(1, 2), deltas.flatten(1, 2), None)


def rpn_losses(output: DenseOutput, anchors: Tensor, scene: Scene, draw: Draw) -> dict[str, Tensor]:
    """Cross-entropy and L1 of the deltas over a sample of the anchors, divided by its size."""
    owners = assign_usable(scene, anchors, _assign)
    # What is not sampled is ignored.
    learned = np.full(owners.shape, IGNORED)
    for row, owner in zip(learned, on_host(owners.unbind()), strict=True):
        sampled = torch.cat(sample(owner, draw, SAMPLES, SAMPLES // 2)).numpy()
        row[sampled] = owner[sampled]
    learns = torch.from_numpy(np.stack((learned != IGNORED).nonzero()))
    image, anchor = learns.to(owners.device, non_blocking=True).unbind()
    owners = torch.from_numpy(learned).to(owners.device, non_blocking=True)
    positives = gather_positives(scene, owners)
    count = (
        positives.per_image().clamp(min=1).sum() + (owners == BACKGROUND).sum(1).clamp(min=1).sum()
    )
    logits, target = output.logits.squeeze(-1)[image, anchor], owners[image, anchor] >= 0
    deltas = CODER.encode(anchors[positives.anchor], positives.box)
    return {
        "rpn_class": bce_loss(logits, target.to(logits)).sum() / count,
        "rpn_box": l1_loss(output.regression[positives.image, positives.anchor], deltas).sum()
        / count,
    }


def _assign(anchors: Tensor, per_level: Sequence[int], boxes: Tensor) -> Tensor:
    return max_iou(anchors, boxes, positive=0.7, negative=0.3, minimum=0.3, low_quality=True)


def sample(owner: NDArray[np.int64], draw: Draw, count: int, limit: int) -> tuple[Tensor, Tensor]:
    """Indices of `limit` positives of `owner (A,)` or fewer,
    and of background that fills them up to `count`; all on the host.
    """
    positive = draw(rows_where(owner >= 0), limit)
    return positive, draw(rows_where(owner == BACKGROUND), count - len(positive))


@torch.no_grad()
def proposals(
    output: DenseOutput, anchors: Tensor, scene: Scene, *, before: int, limit: int
) -> list[Tensor]:
    """The `limit` best boxes `(n, 4)` of each image, cut to it; may be fewer, or none.

    The `before` best of each level take part in the NMS, which is level by level.
    """
    # The best anchors of each level; those on padding come last.
    usable = usable_cells(scene.shapes, scene.strides, scene.sizes).repeat_interleave(NINE, dim=1)
    ranked = output.logits.squeeze(-1).masked_fill(~usable, -torch.inf)
    chosen, levels, first = [], [], 0
    for level, part in enumerate(ranked.split([NINE * h * w for h, w in scene.shapes], dim=1)):
        best = part.topk(min(before, part.shape[1]), dim=1).indices
        chosen.append(best + first)
        levels.append(torch.full_like(best[0], level))
        first += part.shape[1]
    index, level_of = torch.cat(chosen, dim=1), torch.cat(levels)
    # Their boxes.
    deltas = output.regression.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    boxes, scores = CODER.decode(anchors[index], deltas), ranked.gather(1, index)
    # Cut to the image, best first; those that are empty then come last.
    boxes = torch.stack([clip(b, size) for b, size in zip(boxes, scene.sizes, strict=True)])
    valid = (boxes[..., 2:] > boxes[..., :2]).all(-1) & scores.isfinite()
    scores, order = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True)
    counts = valid.sum(1).tolist()
    # In each image those apart from better ones. A network that has learned nothing yet leaves most
    # apart.
    kept = []
    for of_image, best, rows, count in zip(boxes, scores, order, counts, strict=True):
        ranked, levels_of = of_image[rows[:count]], level_of[rows[:count]]
        kept.append(ranked[nms(ranked, best[:count], levels_of, 0.7, limit, first=3 * limit)])
    return kept
