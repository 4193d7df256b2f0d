"""Deformable attention as a module (Deformable DETR, Eq. 2 and 3); its core is `kernels.deformable.ms_deform_attn`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detrellis.nn.kernels.deformable import ms_deform_attn
from detrellis.nn.mlp import xavier_linear
from detrellis.types import Memory, Spatial


class DeformableAttention(nn.Module):
    """Attention to a few learned points around a reference, on every level of the memory."""

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_projection = xavier_linear(width, width)
        self.output_projection = xavier_linear(width, width)
        self._reset()

    def _reset(self) -> None:
        """Offsets start as one direction a head, one step a point; weights start uniform."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_projection, self.output_projection):
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())

    def forward(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """`x (B, N, D)` to the same; the references are relative to the unpadded image."""
        assert where.references is not None, "deformable attention samples around references"
        references = where.references.unsqueeze(2)
        if memory.valid_ratios is not None:
            scale = memory.valid_ratios.unsqueeze(1)
            references = references * (scale if references.shape[-1] == 2 else scale.repeat(1, 1, 1, 2))
        return self.attend(x + where.position, references, memory)

    def attend(self, query: Tensor, references: Tensor, memory: Memory) -> Tensor:
        """As `forward`, with `query (B, N, D)` including its position and `references (B, N, V or 1, 2 or 4)`
        relative to the padded map of each level."""
        split = (self.heads, self.levels, self.points)
        value = self.value_projection(memory.tokens)
        if memory.padding is not None:
            value = value.masked_fill(memory.padding.unsqueeze(-1), 0)
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        locations = self.locations(self.sampling_offsets(query).unflatten(-1, (*split, 2)), references, memory)
        sampled = ms_deform_attn(
            value.unflatten(-1, (self.heads, -1)), memory.shapes, locations, weights.unflatten(-1, split[1:])
        )
        out: Tensor = self.output_projection(sampled)
        return out

    def locations(self, offsets: Tensor, references: Tensor, memory: Memory) -> Tensor:
        """Sampling locations `(B, N, M, V, P, 2)` of the `offsets`, in [0, 1] of each level.

        Offsets count pixels of the level around a point, or `1 / P` of half the size around a box.
        """
        references = references[:, :, None, :, None]  # (B, N, 1, V or 1, 1, 2 or 4)
        if references.shape[-1] == 2:
            sizes = torch.tensor([(w, h) for h, w in memory.shapes], dtype=references.dtype, device=offsets.device)
            return references + offsets / sizes[:, None]
        return references[..., :2] + offsets / self.points * references[..., 2:] * 0.5
