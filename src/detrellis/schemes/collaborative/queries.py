"""Customised positive queries (Co-DETR, section 3.3, Eq. 4):
a branch's positives as queries of the decoder.

They are not matched: each learns the target that the branch assigned. All images of a batch get the
same number; one with fewer positives is filled up with background, which learns "no object", or
with queries that nobody reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from detrellis.boxes import inverse_sigmoid, xyxy_to_cxcywh
from detrellis.nn.mlp import xavier_linear
from detrellis.nn.position import sine_embed
from detrellis.schemes.collaborative.assigners import BACKGROUND
from detrellis.schemes.collaborative.scene import BranchAssignment, Draw, below_each_other
from detrellis.types import Queries, on_device

MIN_QUERIES = 9  # queries of a branch, even where an image has no positive
EPS = 1e-5  # of the inverse sigmoid before the sine embedding


class Chosen(NamedTuple):
    """A branch's queries: `N` slots an image, its `P` positives in the first ones."""

    boxes: Tensor  # (B, N, 4) normalised; anchors reach beyond [0, 1]
    features: Tensor  # (B, N, D)
    image: Tensor  # (P,)
    slot: Tensor  # (P,)
    target: Tensor  # (P,) row of the packed targets
    unused: Tensor | None  # (B, N) bool: slots that hold nothing; None: there are none
    counts: tuple[int, ...]  # positives of each image, on the host; sums to P


def choose(
    assigned: BranchAssignment,
    sizes: Tensor,
    offsets: Sequence[int],
    draw: Draw,
    *,
    max_queries: int = 300,
    fill: bool = True,
) -> Chosen:
    """Queries from what a branch assigned:
    all positives, or `max_queries` of them, and background up to the same number in each image.

    `sizes (B, 2)` height and width of the images, `offsets` the first row of each among the batch's
    targets; without `fill` no background.
    """
    # As many slots as the image with the most positives needs.
    owners = assigned.owner.cpu().numpy()
    positive = [np.flatnonzero(owner >= 0) for owner in owners]
    slots = max(MIN_QUERIES, min(max_queries, max(len(p) for p in positive)))
    # Each image's positives, then background; where both do not suffice the last slots stay empty.
    drawn = [draw(candidates, slots) for candidates in positive]
    anchors = drawn
    if fill:
        others = [
            draw(np.flatnonzero(owner == BACKGROUND), slots - len(rows))
            for rows, owner in zip(drawn, owners, strict=True)
        ]
        anchors = [np.concatenate(pair) for pair in zip(drawn, others, strict=True)]
    table, filled = below_each_other(anchors, slots)
    # Their boxes, normalised, and the features of their cells, which several anchors may share.
    device = sizes.device
    index, images = on_device(table, device), torch.arange(len(table), device=device).unsqueeze(1)
    boxes = assigned.boxes[images, index]
    boxes = xyxy_to_cxcywh(boxes) / sizes.flip(-1).repeat(1, 2).unsqueeze(1).to(boxes)
    cells = index // (assigned.boxes.shape[1] // assigned.features.shape[1])
    # By index, whose gradient is a sum in one order on GPUs too; `gather`'s is not.
    features = assigned.features[images, cells]
    unused = None
    if not filled.all():
        unused = on_device(~filled, device)
        boxes = boxes.masked_fill(unused.unsqueeze(-1), 0.5)
        features = features.masked_fill(unused.unsqueeze(-1), 0)
    # Which slots hold positives, and which target each learns.
    counts = tuple(len(rows) for rows in drawn)
    image, slot = (np.arange(slots) < np.array(counts)[:, None]).nonzero()
    targets = np.array(offsets)[image] + owners[image, table[image, slot]]
    in_image, in_slot, target = on_device(np.stack([image, slot, targets]), device).unbind()
    return Chosen(boxes, features, in_image, in_slot, target, unused, counts)


class PositiveQueries(nn.Module):
    """Eq. 4 of one branch: `Q = Linear(PE(B)) + Linear(E)`,
    each normalised, B the positives' boxes and E the memory's features there.

    `positioned`: the first part gives position and content; otherwise the decoder derives positions
    from the boxes.
    """

    def __init__(self, width: int, *, positioned: bool, features: bool) -> None:
        super().__init__()
        self.width = width
        outputs = 2 * width if positioned else width
        self.place = nn.Sequential(xavier_linear(2 * width, outputs), nn.LayerNorm(outputs))
        self.feature = (
            nn.Sequential(xavier_linear(width, width), nn.LayerNorm(width)) if features else None
        )

    def forward(self, chosen: Chosen, mark: Tensor | None, coordinates: int | None) -> Queries:
        """The queries `(B, N, D)`. `mark`, a number or `(D,)`, is added to positions;
        `coordinates`: 4 where queries have boxes, 2 where they have points, None where they have no
        place."""
        boxes = inverse_sigmoid(chosen.boxes, EPS).sigmoid()
        content = self.place(sine_embed(boxes, self.width // 2, order="xywh"))
        position = None
        if mark is not None:
            position, content = content.chunk(2, dim=-1)
            position = position + mark
        if self.feature is not None:
            content = content + self.feature(chosen.features)
        return Queries(
            content, position, None if coordinates is None else chosen.boxes[..., :coordinates]
        )


def marks(branches: int, width: int) -> nn.Parameter:
    """What tells the branches' positions: a row each, of one number or of `width`."""
    table = torch.empty(branches, width)
    limit = math.sqrt(6 / (branches + width))
    return nn.Parameter(table.uniform_(-limit, limit))
