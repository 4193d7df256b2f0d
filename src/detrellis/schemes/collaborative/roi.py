"""Features of regions of a pyramid:
each from the level that fits its size, by RoIAlign (Mask R-CNN; FPN, Eq. 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from detrellis.nn.kernels.roi import roi_align

# A region of twice as many of the finest level's strides, or more, is read from the next level
FINEST = 14


def region_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Level `(R,)` of regions `(R, 4)` xyxy: up by one with each doubling of the size."""
    size = (boxes[:, 2:] - boxes[:, :2]).prod(-1).sqrt()
    return (size / (FINEST * strides[0]) + 1e-6).log2().floor().clamp(0, len(strides) - 1).long()


def region_features(
    maps: Sequence[Tensor], strides: Sequence[int], regions: Tensor, image: Tensor, cells: int
) -> Tensor:
    """RoIAlign (aligned, as many samples in a cell as it has places):
    `(R, cells, cells, D)` in float32 or better.

    Maps `(B, D, H, W)` of the levels; regions `(R, 4)` xyxy, each of the `image (R,)`.
    """
    return roi_align(maps, strides, regions, image, region_levels(regions, strides), cells)
