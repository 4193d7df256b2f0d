"""Spatially modulated co-attention by itself (Gao et al., ICCV 2021):
DETR whose cross-attention has a Gaussian prior.

Each query has a point, read off its learned position before the first layer; each layer says anew,
head by head, how far from the point to look and how widely. With several levels each has a prior of
its own, and the query decides how much it takes from which.

| deviation from the released code | why |
| --- | --- |
| the point is read with a norm of its own, not the first layer's | no layer lends its parts; equal when fresh |
| centres are fractions of the whole cells that hold image | there of the image's pixels, a part of a cell less |
| each image weighs its own levels | there all take those of the batch's first image, by a slip |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from detrellis.nn.attention import DenseAttention, merge_heads, project
from detrellis.nn.mlp import MLP
from detrellis.nn.prior import at_level, map_attention
from detrellis.types import Memory, Prior, Queries, Spatial, on_device

# Stride of the cells in which a prior is as wide as its scale says; squared distances grow with the
# stride
UNIT = 32


def read_point(width: int) -> nn.Sequential:
    """A layer that reads a query's point, as logits `(..., 2)`, off its position `(..., D)`."""
    return nn.Sequential(nn.LayerNorm(width), MLP(width, width, 2, 3))


class ModulatedPriors(nn.Module):
    """The queries' own positions,
    and each layer's priors over each of the memory's levels of these `strides`.

    It takes the place of the modules of `nn/spatial.py`.
    """

    def __init__(self, width: int, heads: int, layers: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.heads, self.strides = heads, tuple(strides)
        outputs = len(strides) * heads * 2
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.offsets = nn.ModuleList(_constant(width, outputs) for _ in range(layers))
        self.scales = nn.ModuleList(_constant(width, outputs) for _ in range(layers))
        several = len(strides) if len(strides) > 1 else 0
        self.levels = nn.ModuleList(nn.Linear(width, several) for _ in range(layers) if several)

    def forward(
        self, layer: int, x: Tensor, queries: Queries, boxes: Tensor | None, memory: Memory
    ) -> Spatial:
        assert queries.position is not None
        assert boxes is not None
        state = self.norms[layer](x + queries.position)
        shape = (len(self.strides), self.heads, 2)
        offsets, scales = (
            parts[layer](state).unflatten(-1, shape).unbind(2)
            for parts in (self.offsets, self.scales)
        )
        priors = []
        for level, ((height, width), stride) in enumerate(
            zip(memory.shapes, self.strides, strict=True)
        ):
            cells = on_device([width, height], boxes.device, boxes.dtype)
            if memory.valid_ratios is not None:
                cells = cells * memory.valid_ratios[:, level, None]
            centre = (boxes * cells).unsqueeze(2) + offsets[level]
            priors.append(Prior(centre, scales[level] * (stride / UNIT) ** 0.5))
        level_weights = self.levels[layer](state).softmax(-1) if len(self.levels) else None
        return Spatial(queries.position, boxes, priors=tuple(priors), level_weights=level_weights)


def _constant(width: int, outputs: int) -> nn.Linear:
    """A linear layer whose outputs start at 1."""
    layer = nn.Linear(width, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.ones_(layer.bias)
    return layer


class ModulatedAttention(nn.Module):
    """Dense cross-attention under priors:
    a softmax over each level, summed with the queries' level weights.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        plain = DenseAttention(width, heads)
        self.projections, self.output = plain.projections, plain.output

    def forward(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """What `x (B, N, D)` reads from the memory, `(B, N, D)`, without residual and norm."""
        read = [values * level_weight for values, _, level_weight in self._levels(x, where, memory)]
        out: Tensor = self.output(merge_heads(sum(read[1:], read[0])))
        return out

    def attend(
        self, x: Tensor, where: Spatial, memory: Memory
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What each head reads from each level `(B, M, N, d)`,
        and its attention weights `(B, M, N, S)`, both times the level's weight."""
        levels = list(self._levels(x, where, memory))
        return [values * scale for values, _, scale in levels], [
            weights * scale for _, weights, scale in levels
        ]

    def _levels(
        self, x: Tensor, where: Spatial, memory: Memory
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
        """Level by level: what each head reads, its attention weights, and the level's weight."""
        assert where.priors is not None
        q, k, v = project(self.projections, x, where, memory, self.heads)
        sizes = [h * w for h, w in memory.shapes]
        dropout = self.dropout if self.training else 0.0
        pairs = zip(k.split(sizes, dim=2), v.split(sizes, dim=2), where.priors, strict=True)
        for level, (keys, values, prior) in enumerate(pairs):
            level_weight = (
                1.0 if where.level_weights is None else where.level_weights[:, None, :, level, None]
            )
            yield (
                *map_attention(q, keys, values, at_level(memory, level), prior, dropout),
                level_weight,
            )


class IntraScaleAttention(nn.Module):
    """Dense self-attention within each level,
    with the same weights for all (SMCA's multi-scale encoder).
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = DenseAttention(width, heads, dropout=dropout)

    def forward(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """What the tokens `x (B, S, D)` read from their level,
        `(B, S, D)`, without residual and norm.
        """
        sizes = [h * w for h, w in memory.shapes]
        tokens, places = x.split(sizes, dim=1), where.position.split(sizes, dim=1)
        parts = [
            self.attention(part, Spatial(place), at_level(memory, level))
            for level, (part, place) in enumerate(zip(tokens, places, strict=True))
        ]
        return torch.cat(parts, dim=1)
