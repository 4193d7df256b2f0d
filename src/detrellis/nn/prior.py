"""Attention to a map under a Gaussian prior (SMCA: Gao et al., ICCV 2021),
and to one level of several.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detrellis.types import Memory, Prior, Spatial


def log_prior(prior: Prior, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The prior's summands: of rows `(B, M, N, H, 1)` and of columns `(B, M, N, 1, W)`,
    in float32 or better.

    Kept apart: at stride 8 their sum, for each cell of each head and query, is most of what a layer
    would keep.
    """
    centre, scale = (
        t.to(torch.promote_types(t.dtype, torch.float32)).transpose(1, 2) for t in prior[:2]
    )
    summands = []
    for axis, length in ((1, shape[0]), (0, shape[1])):
        cells = torch.arange(length, device=centre.device, dtype=centre.dtype) + prior.first
        reach = scale[..., axis, None] * (cells - centre[..., axis, None])
        summands.append(reach.square() / -8)
    return summands[0].unsqueeze(-1), summands[1].unsqueeze(-2)


def map_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    prior: Prior | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention to the one map of a memory:
    `q (B, M, N, e)`, `k (B, M or 1, S, e)`, `v (B, M, S, d)`.

    Returns `(B, M, N, d)` and the weights `(B, M, N, S)`. Keys that all heads share are never
    expanded. Logits are float32 or better.
    """
    batch, heads, queries, width = q.shape
    # Logits, with the padding left out and the prior added in place.
    scaled = q * width**-0.5
    if k.shape[1] == 1:
        logits = (scaled.flatten(1, 2) @ k.squeeze(1).transpose(1, 2)).view(
            batch, heads, queries, -1
        )
    else:
        logits = scaled @ k.transpose(2, 3)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if memory.padding is not None:
        logits = logits.masked_fill_(memory.padding[:, None, None], -torch.inf)
    if prior is not None:
        rows, columns = log_prior(prior, memory.shapes[0])
        logits.unflatten(3, memory.shapes[0]).add_(rows).add_(columns)
    weights = logits.softmax(-1)
    dropped = nn.functional.dropout(weights, dropout) if dropout else weights
    return dropped.to(v.dtype) @ v, weights


def at_level(memory: Memory, level: int) -> Memory:
    """One level of a memory as a memory of its own."""
    sizes = [h * w for h, w in memory.shapes]
    span = slice(sum(sizes[:level]), sum(sizes[: level + 1]))
    return Memory(
        memory.tokens[:, span],
        memory.position[:, span],
        memory.shapes[level : level + 1],
        None if memory.padding is None else memory.padding[:, span],
        None if memory.valid_ratios is None else memory.valid_ratios[:, level : level + 1],
    )


class AtLevel(nn.Module):
    """Cross-attention that reads one level of several (SAM-DETR++: coarse levels first)."""

    def __init__(self, attention: nn.Module, level: int) -> None:
        super().__init__()
        self.attention, self.level = attention, level

    def forward(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """As the attention's `forward`, over its level of the memory."""
        out: Tensor = self.attention(x, where, at_level(memory, self.level))
        return out


class OverLevels(nn.Module):
    """Cross-attention that reads each level by a module of its own, and weighs what they found as
    the query says (Cascade-DETR). Their `output` projection is one for all."""

    def __init__(self, attentions: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.output = attentions[0].get_submodule("output")
        for attention in attentions:
            attention.register_module("output", nn.Identity())
        self.attentions = nn.ModuleList(attentions)
        self.weigh = nn.Linear(width, len(attentions))

    def forward(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """As the attentions' `forward`, over all levels of the memory."""
        weights = self.weigh(x).softmax(-1).split(1, dim=-1)  # of each level, (B, N, 1)
        sizes = [height * width for height, width in memory.shapes]
        readable = (
            [None] * len(sizes) if where.readable is None else where.readable.split(sizes, dim=2)
        )
        parts = []
        for level, attention in enumerate(self.attentions):
            at_this_level = at_level(memory, level)
            # Contiguous: of a part of a tensor PyTorch computes products in another way if they
            # need no gradient.
            at_this_level = at_this_level._replace(
                tokens=at_this_level.tokens.contiguous(),
                position=at_this_level.position.contiguous(),
            )
            parts.append(
                weights[level]
                * attention(x, where._replace(readable=readable[level]), at_this_level)
            )
        out: Tensor = self.output(torch.stack(parts).sum(0))
        return out


def level_of(layer: int, layers: int, levels: int) -> int:
    """Which level a decoder layer reads:
    coarse to fine, equally many layers each where that is possible.
    """
    return levels - 1 - layer * levels // layers
