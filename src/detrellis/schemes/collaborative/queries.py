"""Customised positive queries (Co-DETR, section 3.3, Eq. 4): a branch's positives as queries of the decoder.

They are not matched: each learns the target that the branch assigned. All images of a batch get the same number; one
with fewer positives is filled up with background, which learns "no object", or with queries that nobody reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.boxes import inverse_sigmoid, xyxy_to_cxcywh
from detrellis.nn.mlp import xavier_linear
from detrellis.nn.position import sine_embed
from detrellis.schemes.collaborative.assigners import BACKGROUND
from detrellis.schemes.collaborative.scene import Draw, Found
from detrellis.types import Assignment, Queries

LEAST = 9  # queries of a branch, even where an image has no positive
EPS = 1e-5  # of the inverse sigmoid before the sine embedding


class Chosen(NamedTuple):
    """A branch's queries: `N` slots an image, its `P` positives in the first ones."""

    boxes: Tensor  # (B, N, 4) in shares of the image; anchors reach beyond [0, 1]
    features: Tensor  # (B, N, D)
    image: Tensor  # (P,)
    slot: Tensor  # (P,)
    target: Tensor  # (P,) row of the packed targets
    unused: Tensor | None  # (B, N) bool: slots that hold nothing; None: there are none

    def assignment(self, layers: int) -> Assignment:
        """Every positive with its target at every layer, each a bag of its own."""
        layer = torch.arange(layers, device=self.image.device).repeat_interleave(len(self.image))
        image, slot, target = (t.repeat(layers) for t in (self.image, self.slot, self.target))
        return Assignment(layer, image, slot, target, torch.arange(len(layer), device=layer.device))


def choose(
    found: Sequence[Found], sizes: Tensor, offsets: Sequence[int], draw: Draw, *, most: int = 300, fill: bool = True
) -> Chosen:
    """Queries from what a branch assigned: all positives, or `most` of them, and background up to the same number.

    `sizes (B, 2)` height and width of the images, `offsets` the first row of each among the batch's targets; without
    `fill` no background.
    """
    positive = [(f.owner >= 0).nonzero().flatten() for f in found]
    slots = max(LEAST, min(most, max(len(p) for p in positive)))
    boxes, features, rows, counts, filled = [], [], [], [], []
    for f, candidates, size, first in zip(found, positive, sizes, offsets, strict=True):
        own = draw(candidates, slots)
        others = (f.owner == BACKGROUND).nonzero().flatten() if fill else own[:0]
        taken = torch.cat([own, draw(others, slots - len(own))])
        short = slots - len(taken)
        shares = xyxy_to_cxcywh(f.boxes[taken]) / size.flip(-1).repeat(2).to(f.boxes)
        boxes.append(F.pad(shares, (0, 0, 0, short), value=0.5))
        features.append(F.pad(f.features[taken // (len(f.boxes) // len(f.features))], (0, 0, 0, short)))
        rows.append(f.owner[own] + first)
        counts.append(len(own))
        filled.append(len(taken))
    device = sizes.device
    place = torch.arange(slots, device=device)
    image = torch.arange(len(found), device=device).repeat_interleave(torch.tensor(counts, device=device))
    slot = torch.cat([place[:n] for n in counts])
    unused = place >= torch.tensor(filled, device=device).unsqueeze(1) if min(filled) < slots else None
    return Chosen(torch.stack(boxes), torch.stack(features), image, slot, torch.cat(rows), unused)


class PositiveQueries(nn.Module):
    """Eq. 4 of one branch: `Q = Linear(PE(B)) + Linear(E)`, each normalised, B the positives' boxes and E the memory's
    features there.

    `positioned`: the first part gives position and content; otherwise the decoder derives positions from the boxes.
    """

    def __init__(self, width: int, *, positioned: bool, features: bool) -> None:
        super().__init__()
        self.width = width
        outputs = 2 * width if positioned else width
        self.place = nn.Sequential(xavier_linear(2 * width, outputs), nn.LayerNorm(outputs))
        self.feature = nn.Sequential(xavier_linear(width, width), nn.LayerNorm(width)) if features else None

    def forward(self, chosen: Chosen, mark: Tensor | None, places: int | None) -> Queries:
        """`mark`, a number or `(D,)`, is added to positions; `places`: how many coordinates a query's place has."""
        shares = inverse_sigmoid(chosen.boxes, EPS).sigmoid()
        content = self.place(sine_embed(shares, self.width // 2, order="xywh"))
        position = None
        if mark is not None:
            position, content = content.chunk(2, dim=-1)
            position = position + mark
        if self.feature is not None:
            content = content + self.feature(chosen.features)
        return Queries(content, position, None if places is None else chosen.boxes[..., :places])


def marks(branches: int, width: int) -> nn.Parameter:
    """What tells the branches' positions: a row each, of one number or of `width`."""
    table = torch.empty(branches, width)
    limit = math.sqrt(6 / (branches + width))
    return nn.Parameter(table.uniform_(-limit, limit))
