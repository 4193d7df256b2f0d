"""Values of an encoder's tokens as maps over the pixels of an image, without its padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis.analysis.pictures import Size
from detrellis.types import Memory

SMALLEST = 1e-30  # a map that is 0 everywhere stays so


def levels(values: Tensor, memory: Memory, image: int) -> list[Tensor]:
    """One value a token of an image, `(S,)`, as a map `(h, w)` a level without its padding."""
    sizes = [height * width for height, width in memory.shapes]
    maps = [part.view(shape) for part, shape in zip(values.split(sizes), memory.shapes, strict=True)]
    if memory.padding is None:
        return maps
    cut = []
    for level, padding in zip(maps, memory.padding[image].split(sizes), strict=True):
        inside = ~padding.view(level.shape)
        height, width = int(inside[:, 0].sum()), int(inside[0].sum())
        cut.append(level[:height, :width])
    return cut


def resized(level: Tensor, size: Size) -> Tensor:
    """`(h, w)` to `(H, W)`, bilinear between the centres of pixels."""
    return F.interpolate(level[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def attention_score(weights: Sequence[Tensor], size: Size) -> Tensor:
    """`(H, W)` with a maximum of 1 from each level's weights `(h, w)`: attention per pixel, so that a level counts as
    much as it is attended to, however coarse it is."""
    total = torch.stack([resized(level, size) * level.numel() for level in weights]).sum(0)
    return total / total.max().clamp(min=SMALLEST)
