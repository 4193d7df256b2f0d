"""Boxes and points on a grid of cells, in pixels of the network's input:
what dense heads assign targets to.

All are in the order level, row, column, anchor of the cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detrellis.nn.constants import kept
from detrellis.schemes.collaborative.scene import Scene

RATIOS = (0.5, 1.0, 2.0)
SCALES = tuple(4 * 2 ** (k / 3) for k in range(3))
NINE = len(RATIOS) * len(SCALES)
Levels = tuple[tuple[int, int], ...]
Shapes = Sequence[tuple[int, int]]  # (height, width) of each level, in cells


def grid_points(
    shapes: Shapes, strides: Sequence[int], like: Tensor, *, offset: float = 0.0
) -> Tensor:
    """`(x, y)` of every cell, `(S, 2)`:
    its upper left corner, or its centre with an `offset` of 0.5.
    """
    return _points(tuple(shapes), tuple(strides), offset, like.dtype, like.device)


@kept(64)
def _points(
    shapes: Levels,
    strides: tuple[int, ...],
    offset: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    points = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y, x = (
            (torch.arange(n, device=device, dtype=dtype) + offset) * stride for n in (height, width)
        )
        points.append(torch.cartesian_prod(y, x).flip(-1))
    return torch.cat(points)


def grid_anchors(
    shapes: Shapes,
    strides: Sequence[int],
    like: Tensor,
    ratios: Sequence[float] = (1.0,),
    scales: Sequence[float] = (8.0,),
) -> Tensor:
    """Anchors `(S * ratios * scales, 4)` xyxy around the cells' corners;
    a ratio is height over width, a scale the side in strides."""
    sides = tuple((scale / math.sqrt(r), scale * math.sqrt(r)) for r in ratios for scale in scales)
    return _anchors(tuple(shapes), tuple(strides), sides, like.dtype, like.device)


@kept(16)
def _anchors(
    shapes: Levels,
    strides: tuple[int, ...],
    sides: tuple[tuple[float, float], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    half = torch.tensor(sides, device=device, dtype=torch.float64) / 2
    cells = [h * w for h, w in shapes]
    each = torch.cat(
        [(half * stride).expand(n, -1, -1) for n, stride in zip(cells, strides, strict=True)]
    ).to(dtype)
    centres = _points(shapes, strides, 0.0, dtype, device).unsqueeze(1)
    return torch.cat([centres - each, centres + each], dim=-1).flatten(0, 1)


def usable_cells(shapes: Shapes, strides: Sequence[int], sizes: Tensor) -> Tensor:
    """Whether a cell lies on the image and not on its padding:
    `sizes (B, 2)` height and width to `(B, S)`.
    """
    corners = grid_points(shapes, strides, sizes)
    return (corners < sizes.flip(-1).unsqueeze(1)).all(-1)


def per_cell(values: Sequence[float], counts: Sequence[int], like: Tensor) -> Tensor:
    """A number for each level, repeated for each of its `counts` cells, level by level:
    `(sum of counts,)`.
    """
    return _per_cell(tuple(values), tuple(counts), like.dtype, like.device)


@kept(64)
def _per_cell(
    values: tuple[float, ...], counts: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    parts = [
        torch.full((n,), value, dtype=dtype, device=device)
        for value, n in zip(values, counts, strict=True)
    ]
    return torch.cat(parts)


def square_anchors(scene: Scene) -> Tensor:
    """One square of eight strides a cell: `(A, 4)` (ATSS)."""
    return grid_anchors(scene.shapes, scene.strides, scene.sizes)


def nine_anchors(scene: Scene) -> Tensor:
    """Three shapes of three sizes a cell: `(A, 4)` (RetinaNet)."""
    return grid_anchors(scene.shapes, scene.strides, scene.sizes, RATIOS, SCALES)


def cell_strides(scene: Scene) -> Tensor:
    """The stride of each cell, `(S, 1)`."""
    return per_cell(scene.strides, [h * w for h, w in scene.shapes], scene.sizes).unsqueeze(-1)
