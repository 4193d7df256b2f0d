"""Box geometry: formats, IoU, generalised IoU,
and the inverse sigmoid with its per-model epsilon.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Boxes `(..., 4)` of centre and size as corners `(x1, y1, x2, y2)`."""
    centre, size = boxes.split(2, dim=-1)
    half = size / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Boxes `(..., 4)` of corners as centre and size `(cx, cy, w, h)`."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of `x`, clamped so that 0 and 1 give `-/+ ln(1/eps)`.

    `eps` belongs to the model, not to numerics: DETR, Conditional and Deformable DETR use 1e-5,
    DAB, DN and DINO 1e-3. It decides how far saturated anchors can be moved.
    """
    # 1.0, not 1, which the ONNX exporter makes a tensor that `clamp` does not take beside a number
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))


def side_distances(base: Tensor, boxes: Tensor, scale: float) -> Tensor:
    """How far the sides of `boxes` lie outside those of `base`:
    left, top, right, bottom, `(..., 4)` each.

    In `1 / scale` of the base's width or height; both are `(cx, cy, w, h)`. `boxes_at` is the
    inverse.
    """
    unit = base[..., 2:] / scale + 1e-16
    corners = cxcywh_to_xyxy(boxes)
    outside = ((base[..., :2] - corners[..., :2]) / unit, (corners[..., 2:] - base[..., :2]) / unit)
    return torch.cat(outside, dim=-1) - scale / 2


def boxes_at(base: Tensor, distances: Tensor, scale: float) -> Tensor:
    """The boxes whose sides lie at `distances (..., 4)` from those of `base (..., 4)`,
    as `side_distances` counts them.

    Sides may cross: the size then is negative.
    """
    unit = base[..., 2:] / scale
    low = base[..., :2] - (scale / 2 + distances[..., :2]) * unit
    high = base[..., :2] + (scale / 2 + distances[..., 2:]) * unit
    return xyxy_to_cxcywh(torch.cat([low, high], dim=-1))


def relative_boxes(deltas: Tensor, boxes: Tensor) -> Tensor:
    """The boxes `(..., 4)` moved by `deltas (..., 4)`:
    centres by that many sizes, sizes by the exponential.

    LW-DETR's box re-parameterisation (section 3.2). What comes out is not held within the image,
    and no smaller than float32, whose range an exponential needs.
    """
    deltas = deltas.to(torch.promote_types(boxes.dtype, torch.float32))
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre + deltas[..., :2] * size, size * deltas[..., 2:].exp()], dim=-1)


def _product(sizes: Tensor) -> Tensor:
    """Areas of widths and heights `(..., 2)`."""
    width, height = sizes.unbind(-1)
    return width * height


def _areas(boxes: Tensor) -> Tensor:
    low, high = boxes.split(2, dim=-1)
    return _product(high - low)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`,
    0 with a finite gradient where two empty boxes leave nothing to divide by.
    """
    empty = denominator <= 0
    return (numerator / denominator.masked_fill(empty, 1)).masked_fill(empty, 0)


def _overlap(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of broadcastable boxes, each as two corners `(..., 2)`."""
    (low, high), (other_low, other_high) = a, b
    inter = _product((torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0))
    return inter, _product(high - low) + _product(other_high - other_low) - inter


def iou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """IoU of aligned (broadcastable) `xyxy` boxes `(..., 4)` -> `(...)`.

    `eps` is added to the union. Some reference codes take 1e-6, which in normalised coordinates
    costs a box of 8 pixels in a large image 0.016; it is for comparing with them.
    """
    inter, union = _overlap(a.split(2, dim=-1), b.split(2, dim=-1))
    return _ratio(inter, union + eps)


def iou_and_giou(a: Tensor, b: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """As `iou` and `giou`, for little more than one of them."""
    (low, high), (other_low, other_high) = corners = a.split(2, dim=-1), b.split(2, dim=-1)
    inter, union = _overlap(*corners)
    # The smallest box around both
    hull = _product(torch.maximum(high, other_high) - torch.minimum(low, other_low))
    overlap = _ratio(inter, union + eps)
    return overlap, overlap - _ratio(hull - union, hull + eps)


def giou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU of aligned (broadcastable) `xyxy` boxes `(..., 4)` -> `(...)`,
    in [-1, 1]; `eps` as `iou`.
    """
    return iou_and_giou(a, b, eps)[1]


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every pair: `(..., n, 4)` and `(..., m, 4)` -> `(..., n, m)`."""
    left, top, right, bottom = a.unsqueeze(-2).unbind(-1)
    other_left, other_top, other_right, other_bottom = b.unsqueeze(-3).unbind(-1)
    # Coordinate by coordinate: on a CPU many times faster than pairs of corners.
    width = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp(min=0)
    height = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp(min=0)
    inter = width * height
    return _ratio(inter, _areas(a).unsqueeze(-1) + _areas(b).unsqueeze(-2) - inter)


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of every pair: `(..., n, 4)` and `(..., m, 4)` -> `(..., n, m)`."""
    return giou(a.unsqueeze(-2), b.unsqueeze(-3))


def ragged(counts: Ints) -> tuple[Ints, Ints]:
    """For rows of `counts (N,)` entries, packed one row after the other:
    each entry's row, and its place in the row.
    """
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)
