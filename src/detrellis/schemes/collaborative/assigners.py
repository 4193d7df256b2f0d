"""One-to-many assignment: which target each anchor of an image learns.

An owner is the row of a target among those of the image, `BACKGROUND` ("no object") or `IGNORED`
(learn nothing). Rules take one image or, with the same dimensions in front of targets and owners, a
batch of them. `possible (..., A, T)` then says which pairs of an anchor and a target exist: neither
padding's anchors nor missing targets take part. None: all do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detrellis.boxes import pairwise_iou
from detrellis.schemes.collaborative.anchors import per_cell
from detrellis.schemes.collaborative.coder import centres, sides

BACKGROUND, IGNORED = -1, -2
INSIDE = 0.01  # pixels that a centre is away from every side of a box it counts as inside of


def all_background(anchors: Tensor, boxes: Tensor) -> Tensor:
    """All anchors `(..., A, 4)` in the background, in each image of the `boxes (..., T, 4)`."""
    return torch.full((*boxes.shape[:-2], anchors.shape[-2]), BACKGROUND, device=anchors.device)


def atss(
    anchors: Tensor,
    per_level: Sequence[int],
    boxes: Tensor,
    possible: Tensor | None = None,
    *,
    k: int = 9,
) -> Tensor:
    """ATSS (Zhang et al., 2020):
    on each level the `k` anchors nearest to a target are its candidates.

    Those whose IoU is at least the candidates' mean plus deviation, and whose centre is inside, are
    positive; an anchor that several targets claim goes to the largest IoU. `anchors (A, 4)` level
    by level, `boxes (..., T, 4)`, xyxy, to owners `(..., A)`.
    """
    if not boxes.shape[-2] or not len(anchors):
        return all_background(anchors, boxes)
    overlap = pairwise_iou(anchors, boxes)
    # Candidates (..., K, T): the k nearest anchors of each level.
    points = centres(anchors)
    distance = (points.unsqueeze(-2) - centres(boxes).unsqueeze(-3)).square().sum(-1)
    if possible is not None:
        distance = distance.masked_fill(~possible, float("inf"))
    nearest, first = [], 0
    for level in distance.split(list(per_level), dim=-2):
        size = level.shape[-2]
        nearest.append(level.topk(min(k, size), dim=-2, largest=False).indices + first)
        first += size
    candidates = torch.cat(nearest, dim=-2)
    # Positive: above the target's threshold, which two candidates or more have, and inside of it.
    quality = overlap.gather(-2, candidates)
    counted = torch.ones_like(quality) if possible is None else possible.gather(-2, candidates)
    count = counted.sum(-2, keepdim=True)
    mean = (quality * counted).sum(-2, keepdim=True) / count
    variance = ((quality - mean).square() * counted).sum(-2, keepdim=True) / (count - 1)
    inside = sides(points[candidates], boxes.unsqueeze(-3)).amin(-1) > INSIDE
    positive = (quality >= mean + variance.sqrt()) & inside & counted.bool()
    # Of the targets that claim an anchor, the one of the largest IoU.
    claims = torch.full_like(overlap, -1.0)
    claims.scatter_(-2, candidates, torch.where(positive, quality, -1.0))
    best, owner = claims.max(-1)
    return torch.where(best >= 0, owner, BACKGROUND)


def max_iou(
    anchors: Tensor,
    boxes: Tensor,
    possible: Tensor | None = None,
    *,
    positive: float,
    negative: float,
    minimum: float,
    low_quality: bool,
) -> Tensor:
    """Faster R-CNN's rule: an IoU of `positive` or more with the best target makes a positive, one
    below `negative` a background, the others are ignored.

    `low_quality`: each target also gets all anchors of its own best IoU, if that is at least
    `minimum`; later targets take from earlier ones. A target that meets no anchor gets none.
    `anchors (A, 4)`, or of each image its own `(..., A, 4)`, `boxes (..., T, 4)`, to owners
    `(..., A)`.
    """
    if not boxes.shape[-2] or not anchors.shape[-2]:
        return all_background(anchors, boxes)
    overlap = pairwise_iou(anchors, boxes)
    if possible is not None:
        overlap = overlap.masked_fill(~possible, -1.0)
    best, owner = overlap.max(-1)
    owner = torch.where(best >= positive, owner, torch.where(best < negative, BACKGROUND, IGNORED))
    if low_quality:
        target_best = overlap.amax(-2, keepdim=True)
        equal = (overlap == target_best) & (target_best >= minimum) & (target_best > 0)
        last = overlap.shape[-1] - 1 - equal.flip(-1).int().argmax(-1)
        owner = torch.where(equal.any(-1), last, owner)
    return owner


def fcos(
    points: Tensor,
    per_level: Sequence[int],
    boxes: Tensor,
    possible: Tensor | None = None,
    *,
    strides: Sequence[int],
    radius: float = 1.5,
) -> Tensor:
    """FCOS (Tian et al., 2019): a point near a target's centre and inside of it learns it,
    on the level of its size.

    Near: less than `radius` strides along both axes. A level has the targets whose farthest side is
    at most 8 strides away (the last: any), and not nearer than the finer level's 8 strides. Of
    several targets the smallest counts. `points (P, 2)` level by level, `boxes (..., T, 4)` xyxy,
    to owners `(..., P)`.
    """
    if not boxes.shape[-2] or not len(points):
        return all_background(points, boxes)
    # Of each point's level: the stride, and the range of sizes. (P, 1)
    limits = [8.0 * stride for stride in strides[:-1]]
    stride, low, high = (
        per_cell(v, per_level, points).unsqueeze(1)
        for v in (strides, [-1.0, *limits], [*limits, float("inf")])
    )
    # Which targets a point may learn, (..., P, T), and the smallest of them.
    across = boxes.unsqueeze(-3)
    away = sides(points.unsqueeze(-2), across)
    farthest = away.amax(-1)
    offset = (points.unsqueeze(-2) - centres(across)).abs().amax(-1)
    fits = (away.amin(-1) > 0) & (offset < radius * stride) & (farthest >= low) & (farthest <= high)
    if possible is not None:
        fits &= possible
    area = (across[..., 2:] - across[..., :2]).prod(-1)
    least, owner = torch.where(fits, area, float("inf")).min(-1)
    return torch.where(least < float("inf"), owner, BACKGROUND)
