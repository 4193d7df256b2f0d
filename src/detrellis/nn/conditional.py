"""Conditional attention (Conditional DETR, section 3): content and position stay apart.

Cross-attention compares contents with contents and positions with positions, `[content | position]`
head by head, so that a head can look for a place whatever is there. DAB-DETR uses the same layers
with other positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detrellis.nn.attention import memory_attention, merge_heads, segmented_attention, split_heads
from detrellis.nn.mlp import xavier_linear
from detrellis.types import Memory, Segment, Spatial


def _projections(width: int, parts: int) -> nn.Linear:
    """`parts` projections in one matrix, each initialised as a layer of its own."""
    packed = nn.Linear(width, parts * width)
    for block in packed.weight.chunk(parts):
        nn.init.xavier_uniform_(block)
    return packed


def _output(width: int) -> nn.Linear:
    layer = xavier_linear(width, width)
    nn.init.zeros_(layer.bias)
    return layer


class ConditionalSelfAttention(nn.Module):
    """Self-attention of query blocks with projections of their own for content (q, k, v) and
    position (q, k).
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.content = _projections(width, 3)
        self.position = _projections(width, 2)
        self.output = _output(width)

    def forward(self, x: Tensor, position: Tensor, segments: Sequence[Segment]) -> Tensor:
        """What `x (B, N, D)` at its `position (B, N, D)` reads,
        `(B, N, D)`, without residual and norm.
        """
        q, k, v = self.content(x).chunk(3, dim=-1)
        q_position, k_position = self.position(position).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (q + q_position, k + k_position, v))
        attended = segmented_attention(q, k, v, segments, self.dropout if self.training else 0.0)
        out: Tensor = self.output(merge_heads(attended))
        return out


class ConditionalCrossAttention(nn.Module):
    """Cross-attention with queries `[content | sine]` and keys `[content | position]`,
    joined in each head.

    `first`: the first decoder layer has no content to speak of yet; positions are added to its
    contents too.
    """

    def __init__(self, width: int, heads: int, *, first: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = xavier_linear(width, width)
        self.query_sine = xavier_linear(width, width)
        self.query_position = xavier_linear(width, width) if first else None
        self.memory = _projections(width, 2)  # keys, values
        self.key_position = xavier_linear(width, width)
        self.output = _output(width)

    def forward(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """What `x (B, N, D)` reads from the memory, `(B, N, D)`, without residual and norm."""
        assert where.sine is not None, "conditional attention needs a spatial query"
        query = self.query(x)
        keys, values = self.memory(memory.tokens).chunk(2, dim=-1)
        key_position = self.key_position(memory.position).expand_as(keys)
        if self.query_position is not None:
            query, keys = query + self.query_position(where.position), keys + key_position
        q = self._joined(query, self.query_sine(where.sine))
        k = self._joined(keys, key_position)
        v = split_heads(values, self.heads)
        attended = memory_attention(
            q, k, v, memory.padding, self.dropout if self.training else 0.0, where.readable
        )
        out: Tensor = self.output(merge_heads(attended))
        return out

    def _joined(self, content: Tensor, position: Tensor) -> Tensor:
        """Both parts `(B, N, M * d)` side by side in each head: `(B, M, N, 2 d)`."""
        return torch.cat(
            [split_heads(content, self.heads), split_heads(position, self.heads)], dim=-1
        )
