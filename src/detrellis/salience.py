"""What an encoder that chooses tokens learns of them (`nn/salience.py`):
how salient each is, by the boxes it lies in.

A level answers for boxes by how far the farthest of their sides lies from a token: 64 pixels on the
finest, twice as many on the next, any distance on the coarsest. Salience-DETR's target falls from 1
in the centre of a box to its corners, so that it knows scales and where objects are; Focus-DETR's
is 1 in every such box.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.nn.encoder import token_centres
from detrellis.types import Memory, Targets

TokenTargets = Literal["salience", "objects"]
REACH = 64.0  # pixels, of the finest level


def level_targets(
    centres: Tensor, boxes: Tensor, low: float, high: float, kind: TokenTargets = "salience"
) -> Tensor:
    """What the tokens of one level at `centres (S, 2)` should say,
    `(S,)`, by corners `boxes (T, 4)`, both in pixels.

    The level answers for boxes whose farthest side lies from `low` to `high` pixels away.
    """
    # (S, T, 2)
    after, before = centres.unsqueeze(1) - boxes[:, :2], boxes[:, 2:] - centres.unsqueeze(1)
    sides = torch.cat([after, before], dim=-1)
    farthest = sides.amax(-1)
    inside = (sides.amin(-1) > 0) & (farthest >= low) & (farthest <= high)
    value = inside.to(centres.dtype)
    if kind == "salience":
        # No number in a box of no size, which has no token inside
        off = (after - before) / (after + before)
        value = torch.where(inside, 1 - off.square().sum(-1).sqrt() / 2, 0)
    return value.amax(1) if len(boxes) else centres.new_zeros(len(centres))


def salience_targets(
    memory: Memory, targets: Targets, sizes: Tensor, kind: TokenTargets = "salience"
) -> Tensor:
    """What all tokens `(B, S)` of a batch should say;
    `sizes (B, 2)` height and width of its images in pixels.
    """
    pixels = sizes.flip(-1).to(targets.boxes.dtype)  # (B, 2) x, y
    centres = (token_centres(memory).to(targets.boxes.dtype) * pixels.unsqueeze(1)).unbind()
    boxes = (cxcywh_to_xyxy(targets.boxes) * pixels.repeat(1, 2)[targets.image]).split(
        targets.sizes
    )
    levels, last = [h * w for h, w in memory.shapes], len(memory.shapes) - 1
    rows = []
    for points, corners in zip(centres, boxes, strict=True):
        parts = []
        for level, part in enumerate(points.split(levels)):
            low = REACH * 2 ** (level - 1) if level else -1.0
            high = math.inf if level == last else REACH * 2**level
            parts.append(level_targets(part, corners, low, high, kind))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def salience_loss(
    memory: Memory,
    targets: Targets,
    sizes: Tensor,
    mean: Callable[[Tensor], Tensor],
    kind: TokenTargets = "salience",
) -> Tensor:
    """Focal loss of what the tokens say, over all but padding, divided by the positive ones;
    `mean` averages their number over all processes."""
    assert memory.salience is not None
    with torch.autocast(memory.salience.device.type, enabled=False):
        logits = memory.salience.to(targets.boxes.dtype)
        wanted = salience_targets(memory, targets, sizes, kind)
        loss = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0)
        if memory.padding is not None:
            loss, wanted = (t.masked_fill(memory.padding, 0) for t in (loss, wanted))
        total: Tensor = loss.sum() / mean((wanted > 0).sum().to(loss.dtype)).clamp(min=1)
    return total
