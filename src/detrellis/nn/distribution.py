"""Boxes as distributions, refined layer by layer (D-FINE, Peng et al., ICLR 2025):
FDR, LQE, and the gateway.

| deviation from the released code | why |
| --- | --- |
| the bins' constants are no parameters | nothing trains them; other people's checkpoints get and give them by name |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrellis.boxes import boxes_at
from detrellis.nn.mlp import MLP
from detrellis.types import SideDistributions


class Bins(NamedTuple):
    """The weighting function's constants: `K`, an even number; `c` and `a` of the paper's Eq. 4."""

    number: int = 32
    scale: float = 4.0
    reach: float = 0.5


def weighting(bins: Bins, like: Tensor) -> Tensor:
    """The distance `W(n)` that each of the bins `0..K` stands for:
    fine around 0, coarse far off (Eq. 4).

    `(K + 1,)`, ascending, of the device of `like` and at least in float32.
    """
    half, far = bins.number // 2, bins.reach * bins.scale
    dtype = torch.promote_types(like.dtype, torch.float32)
    steps = torch.arange(1 - half, half, device=like.device, dtype=dtype)
    inner = steps.sign() * ((far + 1) ** (2 * steps.abs() / (bins.number - 2)) - 1)
    end = inner.new_full((1,), 2 * far)
    return torch.cat([-end, inner, end])


def mean_boxes(sides: SideDistributions) -> Tensor:
    """The boxes `(..., 4)` that the distributions have as their means (Eq. 2)."""
    distances = (sides.logits.softmax(-1) * sides.bins).sum(-1)
    return boxes_at(sides.base, distances, sides.scale)


class QualityEstimator(nn.Module):
    """Location quality (LQE): how sharp the four distributions of a box are,
    as a number for its class logits.

    It starts at 0.
    """

    def __init__(self, top: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.top = top
        self.mlp = MLP(4 * (top + 1), hidden, 1, 2)
        last = self.mlp.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, logits: Tensor) -> Tensor:
        """`(B, N, 1)` of the distributions' `logits (B, N, 4, K + 1)`."""
        best = logits.softmax(-1).topk(self.top, dim=-1).values
        read = torch.cat([best, best.mean(-1, keepdim=True)], dim=-1)
        out: Tensor = self.mlp(read.flatten(2))
        return out


class Gateway(nn.Module):
    """Target gating: a gate a channel for what a query knew and for what it has read,
    instead of their sum.

    Both gates start half open.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, 2 * width)
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, known: Tensor, read: Tensor) -> Tensor:
        """Normalised, `(B, N, D)` of two such."""
        old, new = self.gate(torch.cat([known, read], dim=-1)).sigmoid().chunk(2, dim=-1)
        out: Tensor = self.norm(old * known + new * read)
        return out
