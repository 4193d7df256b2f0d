"""The transformer encoder, dense or deformable, and the grid of points that deformable attention starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detrellis.nn.mlp import FeedForward
from detrellis.types import Memory, Spatial


def token_centres(memory: Memory) -> Tensor:
    """Centre `(x, y)` of every token, `(B or 1, S, 2)`, in [0, 1] of the unpadded image (padding lies beyond 1)."""
    device, dtype = memory.tokens.device, memory.position.dtype
    centres = []
    for level, (height, width) in enumerate(memory.shapes):
        y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
        grid = torch.cartesian_prod(y, x).flip(-1)[None]
        centres.append(grid if memory.valid_ratios is None else grid / memory.valid_ratios[:, level, None])
    return torch.cat(centres, dim=1)


class EncoderLayer(nn.Module):
    """Self-attention over all tokens, then the feed-forward block; post-norm.

    `attention` is any module called with `(x, where, memory)`.
    """

    def __init__(self, attention: nn.Module, feed_forward: FeedForward, width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward

    def forward(self, memory: Memory, references: Tensor | None) -> Memory:
        """The memory with its tokens after this layer."""
        attended = self.attention(memory.tokens, Spatial(memory.position, references), memory)
        tokens = self.norm(memory.tokens + self.dropout(attended))
        return memory._replace(tokens=self.feed_forward(tokens))


class Encoder(nn.Module):
    """A stack of layers, no final norm.

    `references`: whether the attention samples around the tokens' centres. `position_scale`: an MLP of the tokens
    whose output multiplies their positions, anew at each layer (DAB-DETR).
    """

    def __init__(
        self, layers: Sequence[EncoderLayer], *, references: bool, position_scale: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.references, self.position_scale = references, position_scale

    def forward(self, memory: Memory) -> Memory:
        """The memory with encoded tokens."""
        references = token_centres(memory) if self.references else None
        position = memory.position
        for layer in self.layers:
            if self.position_scale is not None:
                memory = memory._replace(position=position * self.position_scale(memory.tokens))
            memory = layer(memory, references)
        return memory._replace(position=position)
