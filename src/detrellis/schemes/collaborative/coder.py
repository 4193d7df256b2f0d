"""How dense heads write a box relative to an anchor or a point."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh

LIMIT = abs(math.log(16 / 1000))  # of the logarithm of a change in size


class Deltas(NamedTuple):
    """Centre shifts in sizes of the anchor and logarithms of size ratios,
    divided by these deviations (R-CNN).
    """

    centre: float = 1.0
    size: float = 1.0

    def encode(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """`(..., 4)` xyxy each to deltas `(..., 4)`."""
        a, b = xyxy_to_cxcywh(anchors), xyxy_to_cxcywh(boxes)
        shift = (b[..., :2] - a[..., :2]) / a[..., 2:] / self.centre
        return torch.cat([shift, (b[..., 2:] / a[..., 2:]).log() / self.size], dim=-1)

    def decode(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """Anchors `(..., 4)` xyxy, moved by `deltas (..., 4)`."""
        a = xyxy_to_cxcywh(anchors)
        centre = a[..., :2] + deltas[..., :2] * self.centre * a[..., 2:]
        size = a[..., 2:] * (deltas[..., 2:] * self.size).clamp(-LIMIT, LIMIT).exp()
        return cxcywh_to_xyxy(torch.cat([centre, size], dim=-1))


def centres(boxes: Tensor) -> Tensor:
    """Points `(..., 2)` in the middle of boxes `(..., 4)` xyxy."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def sides(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances `(..., 4)` left, top, right,
    bottom from points `(..., 2)` to the sides of boxes `(..., 4)`.
    """
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def from_sides(points: Tensor, distances: Tensor) -> Tensor:
    """The inverse of `sides`: boxes `(..., 4)` xyxy."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def centerness(distances: Tensor) -> Tensor:
    """`sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))` of distances `(..., 4)` inside a box
    (FCOS, Eq. 3).
    """
    pairs = torch.stack([distances[..., ::2], distances[..., 1::2]], dim=-2)
    return (pairs.amin(-1) / pairs.amax(-1)).prod(-1).sqrt()


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes `(..., N, 4)` cut to their image of `size (..., 2)` height, width."""
    corner = size.flip(-1).to(boxes)
    return boxes.clamp(min=0).minimum(torch.cat([corner, corner], dim=-1).unsqueeze(-2))
