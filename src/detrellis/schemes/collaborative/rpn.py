"""The region proposal network of Faster R-CNN (Ren et al., 2015):
which anchors hold an object of any class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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
    positives_of,
    precise,
)
from detrellis.schemes.collaborative.scene import Draw, Ints, Scene
from detrellis.types import on_device

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
    for row, owner in zip(learned, owners.cpu().numpy(), strict=True):
        sampled = sample(owner, draw, SAMPLES, SAMPLES // 2)
        row[sampled] = owner[sampled]
    numbers = [kind.sum(1) for kind in (learned >= 0, learned == BACKGROUND)]
    count = int(np.maximum(numbers, 1).sum())
    image, anchor = learns = (learned != IGNORED).nonzero()
    rows = np.stack([image, anchor, learned[learns] >= 0])
    image_at, anchor_at, target = on_device(rows, owners.device).unbind()
    logits = output.logits.squeeze(-1)[image_at, anchor_at]
    positives = positives_of(scene, learned)
    deltas = CODER.encode(anchors[positives.anchor], positives.box)
    return {
        "rpn_class": bce_loss(logits, target.to(logits)).sum() / count,
        "rpn_box": l1_loss(output.regression[positives.image, positives.anchor], deltas).sum()
        / count,
    }


def _assign(
    anchors: Tensor, per_level: Sequence[int], boxes: Tensor, possible: Tensor | None = None
) -> Tensor:
    return max_iou(
        anchors, boxes, possible, positive=0.7, negative=0.3, minimum=0.3, low_quality=True
    )


def sample(owner: Ints, draw: Draw, count: int, limit: int) -> Ints:
    """Indices of `limit` positives of `owner (A,)` or fewer,
    then of background that fills them up to `count`; all on the host.
    """
    positive = draw(np.flatnonzero(owner >= 0), limit)
    background = draw(np.flatnonzero(owner == BACKGROUND), count - len(positive))
    return np.concatenate([positive, background])


class Proposals(NamedTuple):
    """Boxes that may hold an object, best first."""

    boxes: Tensor  # (B, P, 4) xyxy
    valid: Tensor  # (B, P) bool; an image with fewer than others ends in what is not


@torch.no_grad()
def proposals(
    output: DenseOutput, anchors: Tensor, scene: Scene, *, before: int, limit: int
) -> Proposals:
    """The `limit` best boxes of each image, cut to it; may be fewer, or none.

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
    boxes = clip(boxes, scene.sizes)
    valid = (boxes[..., 2:] > boxes[..., :2]).all(-1) & scores.isfinite()
    scores, order = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True)
    boxes, levels_of = boxes.gather(1, order.unsqueeze(-1).expand_as(boxes)), level_of[order]
    counts = valid.sum(1).tolist()
    # In each image those apart from better ones: one image after the other, since NMS compares all
    # with all. A network that has learned nothing yet leaves most apart.
    kept = [
        nms(b[:n], s[:n], levels[:n], 0.7, limit, first=3 * limit)
        for b, s, levels, n in zip(boxes, scores, levels_of, counts, strict=True)
    ]
    rows = pad_sequence(kept, batch_first=True)
    there = np.arange(rows.shape[1]) < np.array([len(k) for k in kept])[:, None]
    return Proposals(
        boxes.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4)), on_device(there, boxes.device)
    )
