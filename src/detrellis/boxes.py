"""Box geometry: formats, IoU, generalised IoU, the inverse sigmoid with its per-model epsilon, and soft-NMS."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """`(..., 4)` centre and size to corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """`(..., 4)` corners to centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of `x`, clamped so that 0 and 1 give `-/+ ln(1/eps)`.

    `eps` belongs to the model, not to numerics: DETR, Conditional and Deformable DETR use 1e-5, DAB, DN and DINO 1e-3.
    It decides how far saturated anchors can be moved.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _iou_and_hull(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, union and smallest enclosing area of broadcastable `xyxy` boxes."""
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    inter = inside[..., 0] * inside[..., 1]
    union = _areas(a) + _areas(b) - inter
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    return _ratio(inter, union + eps), union, hull[..., 0] * hull[..., 1]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, 0 with a finite gradient where two empty boxes leave nothing to divide by."""
    empty = denominator <= 0
    return (numerator / denominator.masked_fill(empty, 1)).masked_fill(empty, 0)


def iou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """IoU of aligned (broadcastable) `xyxy` boxes `(..., 4)` -> `(...)`.

    `eps` is added to the union. Some reference codes take 1e-6, which in normalised coordinates costs a box of 8 pixels
    in a large image 0.016; it is for comparing with them.
    """
    return _iou_and_hull(a, b, eps)[0]


def giou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU of aligned (broadcastable) `xyxy` boxes `(..., 4)` -> `(...)`, in [-1, 1]; `eps` as `iou`."""
    overlap, union, hull = _iou_and_hull(a, b, eps)
    return overlap - _ratio(hull - union, hull + eps)


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


def soft_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, floor: float = 1e-3) -> Tensor:
    """Scores `(N,)` after linear soft-NMS within each class (Bodla et al. 2017); 0 where they fall below `floor`.

    From the best down, each box multiplies by 1 - IoU the score of every box of its class that is still to come and
    whose IoU with it is `threshold` or more. `boxes (N, 4)` xyxy, `scores (N,)`, `labels (N,)`, in any order. Computed
    on the host.
    """
    places, classes = boxes.cpu().double(), labels.cpu().numpy()
    first, second = _candidates(places.numpy(), classes, threshold)
    overlap = iou(places[first], places[second]).numpy()
    near = (overlap >= threshold) & (classes[first] == classes[second])
    first, second, factor = first[near], second[near], 1 - overlap[near]
    crowded = np.zeros(len(boxes), dtype=np.bool_)
    crowded[first] = crowded[second] = True  # the others keep their score: those that must take turns are few mostly
    count, place = crowded.sum(), crowded.cumsum() - 1
    factors = np.ones((count, count))
    factors[place[first], place[second]] = factors[place[second], place[first]] = factor
    before = scores.cpu().double().numpy()
    lowered = np.where(before < floor, 0, before)
    lowered[crowded] = _in_turn(before[crowded], factors, floor)
    return torch.from_numpy(lowered).to(scores)


def _candidates(boxes: Floats, classes: Ints, threshold: float) -> tuple[Ints, Ints]:
    """Rows of two boxes each, among them all pairs of one class whose IoU reaches the threshold.

    They lie less than 1 - `threshold` of a width apart. Sorted by their left sides, with the classes one beside the
    other, the candidates for a box follow it; all `N * N` pairs would take most of the time.
    """
    left, width = boxes[:, 0], boxes[:, 2] - boxes[:, 0]
    left = left + classes * (2 * np.ptp(boxes) + 1 if len(boxes) else 1)
    order = left.argsort()
    left, reach = left[order], (left + (1.001 - threshold) * width)[order]  # 0.001: more than any rounding
    counts = left.searchsorted(reach, side="right") - np.arange(1, len(left) + 1)
    first, rank = ragged(counts)
    return order[first], order[first + 1 + rank]


def ragged(counts: Ints) -> tuple[Ints, Ints]:
    """For rows of `counts (N,)` entries, packed one row after the other: each entry's row, and its place in the row."""
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)


def _in_turn(left: Floats, factors: Floats, floor: float) -> Floats:
    """The scores `left (K,)` when the best of those left, over and over, is taken and multiplies the others."""
    taken = np.zeros_like(left)
    for _ in range(len(left)):
        best = left.argmax()
        if left[best] < floor:
            break
        taken[best], left[best] = left[best], 0
        left *= factors[best]
    return taken
