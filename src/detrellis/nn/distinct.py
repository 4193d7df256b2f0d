"""Distinct query selection (DDQ, Zhang et al., CVPR 2023): a box that overlaps a better one starts no good query.

Neighbouring tokens propose the same object. One-to-one matching lets one query learn it and calls its near copies
background, which the decoder has to tell apart afterwards; here they come last beforehand, by NMS over all classes.

| deviation from the released code | why |
| --- | --- |
| the best proposals compete, `POOL` for each query, not all tokens | boxes of few, and the rest is background |
| where too few are distinct, the others of the pool follow, not queries of zeros | as many queries in every image |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from detrellis.boxes import cxcywh_to_xyxy

POOL = 4  # proposals for each query to choose from


def overlapping(boxes: Tensor, threshold: float) -> Tensor:
    """Which of the `boxes (B, N, 4)`, best first, NMS drops in their image: their IoU with a better one that stays
    exceeds `threshold`. `(B, N)` bool. On torch's meta device, which knows shapes alone, none."""
    images, count = boxes.shape[:2]
    if boxes.is_meta:
        return boxes.new_zeros(images, count, dtype=torch.bool)
    # Images lie side by side in one plane, for one NMS; in float64, where that rounds no box.
    corners = cxcywh_to_xyxy(boxes.detach().double()).flatten(0, 1)
    image = torch.arange(images, device=boxes.device).repeat_interleave(count)
    better = torch.arange(images * count, 0, -1, device=boxes.device).double()
    kept = batched_nms(corners, better, image, threshold)
    return torch.ones_like(image, dtype=torch.bool).index_fill(0, kept, False).view(images, count)
