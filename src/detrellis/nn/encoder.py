"""The transformer encoder on multi-scale deformable attention, and the grid of points that it attends from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detrellis.nn.deformable import DeformableAttention
from detrellis.nn.mlp import FeedForward
from detrellis.types import Memory


def token_centres(memory: Memory) -> Tensor:
    """Centre `(x, y)` of every token, `(B or 1, S, 2)`, in [0, 1] of the unpadded image (padding lies beyond 1)."""
    device, dtype = memory.tokens.device, memory.position.dtype
    centres = []
    for level, (height, width) in enumerate(memory.shapes):
        y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)[None]
        centres.append(grid if memory.valid_ratios is None else grid / memory.valid_ratios[:, level, None])
    return torch.cat(centres, dim=1)


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then the feed-forward block; post-norm."""

    def __init__(self, attention: DeformableAttention, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout=dropout)

    def forward(self, memory: Memory, references: Tensor) -> Memory:
        """One layer: the memory with new tokens."""
        attended = self.attention(memory.tokens, memory.position, references, memory)
        tokens = self.norm(memory.tokens + self.dropout(attended))
        return memory._replace(tokens=self.feed_forward(tokens))


class DeformableEncoder(nn.Module):
    """A stack of layers, no final norm."""

    def __init__(self, layers: Sequence[DeformableEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, memory: Memory) -> Memory:
        """The same memory with encoded tokens."""
        references = token_centres(memory)
        for layer in self.layers:
            memory = layer(memory, references)
        return memory
