"""Distinct query selection (DDQ, Zhang et al., CVPR 2023):
a box that overlaps a better one makes no good query.

Neighbouring tokens propose the same object. One-to-one matching lets one query learn it and calls
its near copies background, which the decoder has to tell apart afterwards. Here they come last, by
NMS over all classes: among the proposals before the decoder, and, where it is asked to, among its
queries before each layer. What is dropped there is not read by other queries in that layer, is of
no class there, and ranks last if it is the last layer.

| deviation from the released code | why |
| --- | --- |
| the best proposals compete, `POOL` for each query, not all tokens | boxes of few, and the rest is background |
| where too few are distinct, the others of the pool follow, not queries of zeros | as many queries in every image |
| what is dropped is read by nobody; in the code by the kept ones | as the paper describes it |
| scores between layers are the heads' outputs; in the code those of states that are not normalised | as trained |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from detrellis.boxes import cxcywh_to_xyxy, pairwise_iou
from detrellis.nn.order import at_hand, best_first, exporting
from detrellis.types import Segment

ROUNDS = 24  # of NMS where its result is not read; more than such chains of boxes are long
POOL = 4  # proposals for each query to choose from
NEVER = -50.0  # a class logit that ranks a query behind all others, and as a negative costs nothing


def overlapping(boxes: Tensor, threshold: float) -> Tensor:
    """Which of the `boxes (B, N, 4)`, best first, NMS drops in their image: their IoU with a better
    one that stays exceeds `threshold`. `(B, N)` bool. On torch's meta device, which knows shapes
    alone, none."""
    images, count = boxes.shape[:2]
    if boxes.is_meta:
        return boxes.new_zeros(images, count, dtype=torch.bool)
    if not at_hand(boxes):
        return _overlapping_in_rounds(boxes.detach(), threshold)
    # Images lie side by side in one plane, for one NMS; in float64, where that rounds no box.
    corners = cxcywh_to_xyxy(boxes.detach().double()).flatten(0, 1)
    image = torch.arange(images, device=boxes.device).repeat_interleave(count)
    better = torch.arange(images * count, 0, -1, device=boxes.device).double()
    kept = batched_nms(corners, better, image, threshold)
    return torch.ones_like(image, dtype=torch.bool).index_fill(0, kept, False).view(images, count)


def _overlapping_in_rounds(boxes: Tensor, threshold: float) -> Tensor:
    """As `overlapping`, in operations whose shapes do not depend on the boxes: for graphs, and for
    GPUs, whose NMS the host would wait for.

    Each round drops what overlaps a better one that the round before keeps. After n rounds it is
    right for all boxes that are not at the end of a chain of more than n, each of which overlaps
    the next.
    """
    corners = cxcywh_to_xyxy(boxes.to(torch.promote_types(boxes.dtype, torch.float32)))
    # Image by image, since the IoU of all pairs takes several times the memory of what is left of
    # it; a graph may not know how many images there are.
    images = [corners] if exporting() else corners.split(1)
    # Of zeros and ones, in the precision of products, which would convert them in each round
    device = boxes.device.type
    mixed = torch.is_autocast_enabled(device)
    kind = torch.get_autocast_dtype(device) if mixed else corners.dtype
    overlaps = torch.cat(
        [(pairwise_iou(image, image) > threshold).to(kind).triu(1) for image in images]
    )
    kept = overlaps.new_ones(boxes.shape[0], 1, boxes.shape[1])
    for _ in range(ROUNDS):
        # A sum of ones is 0 in every precision only where there is none
        kept = (kept @ overlaps).lt_(0.5)
    return kept.squeeze(1) == 0


def keep_distinct(
    segments: Sequence[Segment], logits: Tensor, boxes: Tensor, threshold: float
) -> list[Segment]:
    """The segments with what `overlapping` says of each copy's queries as `unused`,
    by their best class.

    `logits (B, N, C)` and `boxes (B, N, 4)` of all queries. Segments with several queries a target
    stay as they are.
    """
    sizes = [segment.size for segment in segments]
    scores = logits.detach().amax(-1).split(sizes, dim=1)
    kept = []
    for segment, score, box in zip(
        segments, scores, boxes.detach().split(sizes, dim=1), strict=True
    ):
        if not segment.repeats:
            score, box = (
                t.reshape(-1, segment.size // segment.copies, *t.shape[2:]) for t in (score, box)
            )
            order = best_first(score)
            ranked = overlapping(box.gather(1, order.unsqueeze(-1).expand_as(box)), threshold)
            dropped = torch.zeros_like(ranked).scatter(1, order, ranked)
            segment = segment._replace(unused=dropped.reshape(-1, segment.size))
        kept.append(segment)
    return kept


def withhold(logits: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The `logits (B, N, C)` without those of queries that `keep_distinct` dropped."""
    dropped = [None if segment.repeats else segment.unused for segment in segments]
    if all(part is None for part in dropped):
        return logits
    none = torch.zeros_like(logits[..., 0], dtype=torch.bool).split(
        [segment.size for segment in segments], dim=1
    )
    parts = [empty if part is None else part for part, empty in zip(dropped, none, strict=True)]
    return logits.masked_fill(torch.cat(parts, dim=1).unsqueeze(-1), NEVER)
