"""One-to-many assignment: which target each anchor of an image learns.

An owner is the row of a target among those of the image, `BACKGROUND` ("no object") or `IGNORED`
(learn nothing).
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


def all_background(anchors: Tensor) -> Tensor:
    """All anchors `(A, 4)` in the background: `(A,)`."""
    return torch.full((len(anchors),), BACKGROUND, device=anchors.device)


def atss(anchors: Tensor, per_level: Sequence[int], boxes: Tensor, k: int = 9) -> Tensor:
    """ATSS (Zhang et al., 2020):
    on each level the `k` anchors nearest to a target are its candidates.

    Those whose IoU is at least the candidates' mean plus deviation, and whose centre is inside, are
    positive; an anchor that several targets claim goes to the largest IoU. `anchors (A, 4)` level
    by level, `boxes (T, 4)`, xyxy, to owners `(A,)`.
    """
    if not len(boxes) or not len(anchors):
        return all_background(anchors)
    overlap = pairwise_iou(anchors, boxes)
    # Candidates (K, T): the k nearest anchors of each level.
    points = centres(anchors)
    distance = (points.unsqueeze(1) - centres(boxes)).square().sum(-1)
    nearest, first = [], 0
    for level in distance.split(list(per_level)):
        nearest.append(level.topk(min(k, len(level)), dim=0, largest=False).indices + first)
        first += len(level)
    candidates = torch.cat(nearest)
    # Positive: above the target's threshold, and inside of it.
    quality = overlap.gather(0, candidates)
    threshold = quality.mean(0) + (quality.std(0) if len(quality) > 1 else float("nan"))
    inside = sides(points[candidates], boxes).amin(-1) > INSIDE
    # Of the targets that claim an anchor, the one of the largest IoU.
    claims = torch.full_like(overlap, -1.0)
    claims.scatter_(0, candidates, torch.where((quality >= threshold) & inside, quality, -1.0))
    best, owner = claims.max(1)
    return torch.where(best >= 0, owner, BACKGROUND)


def max_iou(
    anchors: Tensor,
    boxes: Tensor,
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
    `anchors (A, 4)`, `boxes (T, 4)`, to owners `(A,)`.
    """
    if not len(boxes) or not len(anchors):
        return all_background(anchors)
    overlap = pairwise_iou(anchors, boxes)
    best, owner = overlap.max(1)
    owner = torch.where(best >= positive, owner, torch.where(best < negative, BACKGROUND, IGNORED))
    if low_quality:
        target_best = overlap.amax(0)
        equal = (overlap == target_best) & (target_best >= minimum) & (target_best > 0)
        last = overlap.shape[1] - 1 - equal.flip(1).int().argmax(1)
        owner = torch.where(equal.any(1), last, owner)
    return owner


def fcos(
    points: Tensor,
    per_level: Sequence[int],
    boxes: Tensor,
    *,
    strides: Sequence[int],
    radius: float = 1.5,
) -> Tensor:
    """FCOS (Tian et al., 2019): a point near a target's centre and inside of it learns it,
    on the level of its size.

    Near: less than `radius` strides along both axes. A level has the targets whose farthest side is
    at most 8 strides away (the last: any), and not nearer than the finer level's 8 strides. Of
    several targets the smallest counts. `points (P, 2)` level by level, `boxes (T, 4)` xyxy, to
    owners `(P,)`.
    """
    if not len(boxes) or not len(points):
        return all_background(points)
    # Of each point's level: the stride, and the range of sizes. (P, 1)
    limits = [8.0 * stride for stride in strides[:-1]]
    stride, low, high = (
        per_cell(v, per_level, points).unsqueeze(1)
        for v in (strides, [-1.0, *limits], [*limits, float("inf")])
    )
    # Which targets a point may learn, (P, T), and the smallest of them.
    away = sides(points.unsqueeze(1), boxes)
    farthest = away.amax(-1)
    offset = (points.unsqueeze(1) - centres(boxes)).abs().amax(-1)
    fits = (away.amin(-1) > 0) & (offset < radius * stride) & (farthest >= low) & (farthest <= high)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    least, owner = torch.where(fits, area, float("inf")).min(1)
    return torch.where(least < float("inf"), owner, BACKGROUND)
