"""Features of regions of a pyramid: each from the level that fits its size, by RoIAlign (Mask R-CNN; FPN, Eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from detrellis.schemes.collaborative import roi_cpu

FINEST = 14  # a region of twice as many of the finest level's strides, or more, is read from the next level


def region_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Level `(R,)` of regions `(R, 4)` xyxy: up by one with each doubling of the size."""
    size = (boxes[:, 2:] - boxes[:, :2]).prod(-1).sqrt()
    return (size / (FINEST * strides[0]) + 1e-6).log2().floor().clamp(0, len(strides) - 1).long()


def region_features(maps: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], cells: int) -> Tensor:
    """RoIAlign (aligned, as many samples in a cell as it has places): `(R, cells, cells, D)` in float32 or better.

    Maps `(B, D, H, W)` of the levels; regions `(n, 4)` xyxy of each image, one image after the other in the result.
    """
    precise = torch.promote_types(maps[0].dtype, torch.float32)
    maps = [m.to(precise) for m in maps]
    regions = torch.cat(list(boxes)).to(precise)
    image = torch.cat([torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)])
    level = region_levels(regions, strides)
    read = roi_cpu.align if regions.device.type == "cpu" else align
    return read(maps, strides, regions, image, level, cells)


def align(
    maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, image: Tensor, level: Tensor, cells: int
) -> Tensor:
    """As `roi_cpu.align`, by torchvision, level by level."""
    images = len(maps[0])
    group = level * images + image
    order = group.argsort(stable=True)
    counts = torch.bincount(group, minlength=images * len(maps)).tolist()
    groups = boxes[order].split(counts)
    read = torch.cat(
        [
            roi_align(m, list(groups[k * images : (k + 1) * images]), cells, 1 / stride, aligned=True)
            for k, (m, stride) in enumerate(zip(maps, strides, strict=True))
        ]
    )
    return torch.empty_like(read).index_copy(0, order, read).permute(0, 2, 3, 1)
