"""Bilinear samples of maps: `grid_sample`, or gathers for runtimes that compute it wrongly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

_BY_GATHERS = ContextVar("by gathers", default=False)


@contextlib.contextmanager
def gathers() -> Iterator[None]:
    """Let `grid_sample` be a sum of gathered rows while a network is traced: TensorRT 10.14 to 11.1
    compiles attention around the operation of that name wrongly (TensorRT#4813).
    """
    token = _BY_GATHERS.set(True)
    try:
        yield
    finally:
        _BY_GATHERS.reset(token)


def grid_sample(
    maps: Tensor, grid: Tensor, *, border: bool = False, align_corners: bool = False
) -> Tensor:
    """Bilinear samples `(B, D, h, w)` of `maps (B, D, H, W)` at `grid (B, h, w, 2)`, (x, y) from -1
    to 1; outside the map its border, or zero. Types must agree.
    """
    if _BY_GATHERS.get():
        return by_gathers(maps, grid, border=border, align_corners=align_corners)
    padding = "border" if border else "zeros"
    return F.grid_sample(
        maps, grid, mode="bilinear", padding_mode=padding, align_corners=align_corners
    )


def by_gathers(maps: Tensor, grid: Tensor, *, border: bool, align_corners: bool) -> Tensor:
    """As `F.grid_sample`: the four rows around each point, gathered from a table of all places."""
    images, width, rows, columns = maps.shape
    table = maps.permute(0, 2, 3, 1).reshape(-1, width)
    sides = torch.tensor([columns, rows], dtype=grid.dtype, device=grid.device)
    spread, shift = (sides - 1, sides * 0) if align_corners else (sides, sides * 0 + 0.5)
    at = (grid + 1) / 2 * spread - shift  # in places
    if border:
        at = torch.minimum(at.clamp(min=0), sides - 1)
    first = at.floor()
    image = torch.arange(images, device=grid.device).view(-1, 1, 1) * (rows * columns)
    out = torch.zeros((), dtype=maps.dtype, device=maps.device)
    for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
        place = first + torch.tensor(corner, dtype=grid.dtype, device=grid.device)
        inside = ((place >= 0) & (place < sides)).all(-1)
        weight = (1 - (at - place).abs()).prod(-1) * inside
        x, y = torch.minimum(place.clamp(min=0), sides - 1).long().unbind(-1)
        out = out + F.embedding(image + y * columns + x, table) * weight.unsqueeze(-1)
    return out.permute(0, 3, 1, 2)
