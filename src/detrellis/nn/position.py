"""Sine encodings of image positions, points and boxes.

The image map's constants differ by model (see `SineMap`); queries always use temperature 10000, as
the released codes of DAB, DN and DINO do although their papers name 20 for both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detrellis.nn.constants import kept


def sine_features(values: Tensor, features: int, temperature: float = 10000.0) -> Tensor:
    """Interleaved `sin(v/f_0), cos(v/f_0), sin(v/f_2), ...` with
    `f_i = temperature^(2 floor(i/2) / features)`.

    `values (...)`, already times 2 pi, to `(..., features)`.
    """
    angles = values.unsqueeze(-1) / _periods(features, temperature, values.dtype, values.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


@kept(64)
def _periods(features: int, temperature: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The `f_i` of `sine_features` for every other i, `(features / 2,)`."""
    index = torch.arange(features // 2, device=device, dtype=dtype)
    return temperature ** (2 * index / features)


@kept(8)
def _columns(order: str, device: torch.device) -> Tensor:
    return torch.tensor(["xywh".index(c) for c in order], device=device)


def sine_embed(
    coordinates: Tensor, width: int, *, order: str = "yxwh", temperature: float = 10000.0
) -> Tensor:
    """Encode points `(..., 2)` or boxes `(..., 4)` in [0,
    1] with `width` features for each coordinate.

    `order` arranges the coordinates of `(cx, cy, w, h)`: `"yxwh"` for decoder queries, `"xywh"` for
    the two-stage proposals of Deformable DETR, which do not swap. Returns `(..., 2 * width)` or
    `(..., 4 * width)`.
    """
    order = order[: coordinates.shape[-1]]
    if not "xywh".startswith(order):
        coordinates = coordinates.index_select(-1, _columns(order, coordinates.device))
    return sine_features(coordinates * (2 * math.pi), width, temperature).flatten(-2)


class SineMap(nn.Module):
    """The image position map: normalised row and column indices, sine-encoded, rows first.

    DETR and Conditional DETR: temperature 10000, offset 0. DAB, DN and DINO: 20, 0. Deformable
    DETR: 10000, -0.5. `blank`: 0 on padding, where the division leaves noise; SAM-DETR reads
    regions that reach there.
    """

    def __init__(
        self, width: int, *, temperature: float, offset: float, blank: bool = False
    ) -> None:
        super().__init__()
        self.width, self.temperature, self.offset, self.blank = width, temperature, offset, blank

    def forward(self, valid: Tensor) -> Tensor:
        """`valid (B, H, W)` True on image pixels (any dtype of 0/1) to `(B, H * W, D)`,
        in `valid`'s float dtype.
        """
        embedding = _sine_map(valid, self.width, self.temperature, self.offset)
        return (embedding * valid.unsqueeze(-1) if self.blank else embedding).flatten(1, 2)

    def unpadded(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What `forward` gives for an image `(H, W)` that is valid everywhere, `(1, H * W, D)`."""
        return _unpadded_map(shape, self.width, self.temperature, self.offset, dtype, device)


def _sine_map(valid: Tensor, width: int, temperature: float, offset: float) -> Tensor:
    if not valid.is_floating_point():
        valid = valid.to(torch.get_default_dtype())
    axes = []
    for dim in (1, 2):
        count = valid.cumsum(dim)
        last = count.narrow(dim, -1, 1)
        axes.append((count + offset) / (last + 1e-6) * (2 * math.pi))
    return torch.cat([sine_features(a, width // 2, temperature) for a in axes], dim=-1)


@kept(8)  # few: those of a large image are megabytes
def _unpadded_map(
    shape: tuple[int, int],
    width: int,
    temperature: float,
    offset: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return _sine_map(
        torch.ones(1, *shape, dtype=dtype, device=device), width, temperature, offset
    ).flatten(1, 2)
