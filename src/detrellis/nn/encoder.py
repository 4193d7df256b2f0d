"""The transformer encoder, dense or deformable,
and the grid of points that deformable attention starts from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detrellis.nn.constants import kept
from detrellis.nn.mlp import FeedForward
from detrellis.nn.recompute import recomputable
from detrellis.types import Memory, Spatial

Shapes = tuple[tuple[int, int], ...]  # (height, width) of each level


def token_centres(memory: Memory) -> Tensor:
    """Centre `(x, y)` of every token, `(B or 1, S, 2)`,
    in [0, 1] of the unpadded image (padding lies beyond 1).
    """
    centres = cell_centres(memory.shapes, memory.position.dtype, memory.tokens.device)
    if memory.valid_ratios is None:
        return centres
    return centres / memory.valid_ratios[:, token_levels(memory.shapes, memory.tokens.device)]


@kept(64)
def cell_centres(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centre `(x, y)` of every cell of the levels, `(1, S, 2)`, in [0, 1] of its map."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
        centres.append(torch.cartesian_prod(y, x).flip(-1))
    return torch.cat(centres)[None]


@kept(64)
def token_levels(shapes: Shapes, device: torch.device) -> Tensor:
    """The level of every token, `(S,)`."""
    return torch.cat(
        [torch.full((h * w,), level, device=device) for level, (h, w) in enumerate(shapes)]
    )


class EncoderLayer(nn.Module):
    """Self-attention over all tokens, then the feed-forward block; post-norm.

    `attention` is any module called with `(x, where, memory)`.
    """

    recomputed = False  # in the backward pass

    def __init__(
        self, attention: nn.Module, feed_forward: FeedForward, width: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward

    def forward(self, memory: Memory, references: Tensor | None) -> Memory:
        """The memory with its tokens after this layer."""
        return memory._replace(
            tokens=self.refine(memory.tokens, Spatial(memory.position, references), memory)
        )

    @recomputable
    def refine(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """Tokens `x (B, N, D)` after this layer, in which they read the `memory`."""
        out: Tensor = self.feed_forward(
            self.norm(x + self.dropout(self.attention(x, where, memory)))
        )
        return out


class MemoryFusion(nn.Module):
    """One memory of the tokens before the encoder and after each of its layers (Stable-DINO, Liu et
    al., 2023).
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width * (layers + 1), width)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Tokens `(B, S, D)` of as many before the first layer and after each."""
        fused: Tensor = self.norm(self.projection(torch.cat(list(states), dim=-1)))
        return fused


class Encoder(nn.Module):
    """A stack of layers, no final norm.

    `references`: whether the attention samples around the tokens' centres. `position_scale`: an MLP
    of the tokens whose output multiplies their positions, anew at each layer (DAB-DETR). `fusion`:
    what makes the memory of the tokens at all depths; None: the last layer's are the memory.
    """

    def __init__(
        self,
        layers: Sequence[EncoderLayer],
        *,
        references: bool,
        position_scale: nn.Module | None = None,
        fusion: MemoryFusion | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.references, self.position_scale, self.fusion = references, position_scale, fusion

    def forward(self, memory: Memory, head: nn.Module | None = None) -> Memory:
        """The memory with encoded tokens, whatever `head` proposes boxes from it."""
        references = token_centres(memory) if self.references else None
        position, states = memory.position, [memory.tokens]
        for layer in self.layers:
            if self.position_scale is not None:
                memory = memory._replace(position=position * self.position_scale(memory.tokens))
            memory = layer(memory, references)
            if self.fusion is not None:
                states.append(memory.tokens)
        if self.fusion is not None:
            memory = memory._replace(tokens=self.fusion(states))
        return memory._replace(position=position)
