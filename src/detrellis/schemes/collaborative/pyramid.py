"""From the encoder's memory to the levels that auxiliary heads read (Co-DETR, section 3.2: the
multi-scale adapter).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.nn.neck import MapNorm
from detrellis.types import Memory

FINEST, COARSEST = 8, 128  # strides of the levels made from a single one


def level_maps(memory: Memory) -> list[Tensor]:
    """The memory's tokens as one map `(B, D, H, W)` a level."""
    parts = memory.tokens.split([h * w for h, w in memory.shapes], dim=1)
    return [
        p.transpose(1, 2).unflatten(2, shape) for p, shape in zip(parts, memory.shapes, strict=True)
    ]


def _step(width: int, *, coarser: bool) -> nn.Sequential:
    layer = nn.Conv2d(width, width, 3, stride=2 if coarser else 1, padding=1)
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer, MapNorm(32, width))


class Coarser(nn.Module):
    """The levels of a multi-scale encoder, and one coarser than the last."""

    def __init__(self, width: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = (*strides, 2 * strides[-1])
        self.down = _step(width, coarser=True)

    def forward(self, memory: Memory) -> tuple[Tensor, ...]:
        """Maps `(B, D, H, W)`, finest first."""
        maps = level_maps(memory)
        return (*maps, self.down(maps[-1]))


class Pyramid(nn.Module):
    """Strides 8 to 128 from the one level of a single-scale encoder: up by bilinear interpolation
    and a convolution, down by strided convolutions."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        up, down = (FINEST * 2**i for i in range(5) if FINEST * 2**i < stride), COARSEST // stride
        self.finer = nn.ModuleList(_step(width, coarser=False) for _ in up)
        self.coarser = nn.ModuleList(
            _step(width, coarser=True) for _ in range(down.bit_length() - 1)
        )
        self.strides = tuple(FINEST * 2**i for i in range(5))

    def forward(self, memory: Memory) -> tuple[Tensor, ...]:
        """Maps `(B, D, H, W)`, finest first."""
        maps = level_maps(memory)
        for layer in self.finer:
            maps.insert(0, layer(F.interpolate(maps[0], scale_factor=2.0, mode="bilinear")))
        for layer in self.coarser:
            maps.append(layer(maps[-1]))
        return tuple(maps)
