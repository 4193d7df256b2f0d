"""Deformable attention as a module (Deformable DETR, Eq. 2 and 3);
its core is `kernels.deformable.ms_deform_attn`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detrellis.nn.constants import kept
from detrellis.nn.kernels.deformable import ms_deform_attn
from detrellis.nn.kernels.softmax import softmax
from detrellis.nn.mlp import xavier_linear
from detrellis.nn.pieces import in_pieces
from detrellis.types import Memory, Spatial, on_device

# About: its location, and the rows and weights of four cells
VALUES_A_SAMPLE = 8


class DeformableAttention(nn.Module):
    """Attention to a few learned points around a reference, on every level of the memory.

    `points` of each head on each level, or on one level after the other (RT-DETRv2): a level with
    twice as many is then sampled as two levels of half as many. `offset_scale`: offsets around a
    box count `offset_scale / points` of its sides. `discrete` reads the nearest cell instead of
    four, so that offsets learn nothing and stay. Not `projected`: each head reads its channels of
    the memory itself, and what they read is the output (D-FINE).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        levels: int,
        points: int | Sequence[int],
        *,
        offset_scale: float = 0.5,
        discrete: bool = False,
        projected: bool = True,
    ) -> None:
        super().__init__()
        self.counts = [points] * levels if isinstance(points, int) else list(points)
        self.points = math.gcd(*self.counts)
        self.order = [
            level for level, count in enumerate(self.counts) for _ in range(count // self.points)
        ]
        self.levels, self.even = len(self.order), len(self.order) == levels
        self.heads, self.offset_scale, self.discrete = heads, offset_scale, discrete
        self.sampling_offsets = nn.Linear(width, heads * self.levels * self.points * 2)
        self.attention_weights = nn.Linear(width, heads * self.levels * self.points)
        self.value_projection, self.output_projection = (
            xavier_linear(width, width) if projected else nn.Identity() for _ in range(2)
        )
        self._reset()
        if discrete:
            self.sampling_offsets.requires_grad_(False)

    def _reset(self) -> None:
        """Offsets start as one direction a head, one step a point; weights start uniform."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for projection in (self.value_projection, self.output_projection):
            if isinstance(projection, nn.Linear):
                nn.init.zeros_(projection.bias)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.cat(
            [torch.arange(1, count + 1, dtype=torch.float32) for count in self.counts]
        )
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction[:, None] * steps[:, None]).flatten())

    def forward(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """`x (B, N, D)` to the same; the references are relative to the unpadded image."""
        assert where.references is not None, "deformable attention samples around references"
        references = where.references.unsqueeze(2)
        if memory.valid_ratios is not None:
            scale = memory.valid_ratios.unsqueeze(1)
            references = references * (
                scale if references.shape[-1] == 2 else scale.repeat(1, 1, 1, 2)
            )
        return self.attend(x + where.position, references, memory)

    def attend(self, query: Tensor, references: Tensor, memory: Memory) -> Tensor:
        """As `forward`, with `query (B, N, D)` including its position and
        `references (B, N, V or 1, 2 or 4)` relative to the padded map of each level."""
        split = (self.heads, self.levels, self.points)
        value = self.value_projection(memory.tokens)
        if memory.padding is not None:
            value = value.masked_fill(memory.padding.unsqueeze(-1), 0)
        values, shapes = self._sampled(value, memory.shapes)
        values = values.unflatten(-1, (self.heads, -1))
        sample = sample_nearest if self.discrete else ms_deform_attn

        def read(query: Tensor, references: Tensor) -> Tensor:
            weights = softmax(self.attention_weights(query).unflatten(-1, (self.heads, -1)))
            offsets = self.sampling_offsets(query).unflatten(-1, (*split, 2))
            locations = self.locations(offsets, references, memory)
            sampled = sample(values, shapes, locations, weights.unflatten(-1, split[1:]))
            out: Tensor = self.output_projection(sampled)
            return out

        return in_pieces(read, query, references, width=VALUES_A_SAMPLE * math.prod(split))

    def locations(self, offsets: Tensor, references: Tensor, memory: Memory) -> Tensor:
        """Sampling locations `(B, N, M, V, P, 2)` of the `offsets`,
        in [0, 1] of each sampled level.

        Offsets count pixels of the level around a point, or `offset_scale / points` of the size
        around a box.
        """
        if self.even or references.shape[2] == 1:
            references = references[:, :, None, :, None]  # (B, N, 1, V or 1, 1, 2 or 4)
        else:
            references = references[:, :, None, self.order, None]
        if references.shape[-1] == 2:
            shapes = tuple(memory.shapes[level] for level in self.order)
            sizes = _sizes(shapes, offsets.shape[-2], references.dtype, offsets.device)
            # A pair of numbers for all levels and points of a head would be read by itself again
            # and again, which takes a CPU ten times as long.
            points = references.expand(-1, -1, -1, *offsets.shape[3:]).contiguous()
            return torch.addcdiv(points, offsets, sizes)
        centre, size = references.split(2, dim=-1)
        if self.even:
            return torch.addcmul(centre, offsets, size, value=self.offset_scale / self.points)
        counts = on_device(self.counts, offsets.device, offsets.dtype)
        relative = offsets / counts[self.order, None, None]
        return torch.addcmul(centre, relative, size, value=self.offset_scale)

    def _sampled(
        self, value: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Sequence[tuple[int, int]]]:
        """Values `(B, S, D)` and shapes of the levels, each as often as it is sampled."""
        if self.even:
            return value, shapes
        maps = value.split([h * w for h, w in shapes], dim=1)
        return torch.cat([maps[level] for level in self.order], dim=1), [
            shapes[level] for level in self.order
        ]


@kept(64)
def _sizes(
    shapes: tuple[tuple[int, int], ...], points: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Width and height of each level, `(V, P, 2)`."""
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=dtype, device=device)
    return sizes[:, None].repeat(1, points, 1)


def sample_nearest(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """As `ms_deform_attn`, of one cell for each location: the nearest to the location half a cell
    on, as RT-DETRv2 reads it, and on the map's edge where that lies outside."""
    sizes = torch.tensor([(w, h) for h, w in shapes], device=value.device)
    starts = torch.tensor([0, *(h * w for h, w in shapes)], device=value.device).cumsum(0)[:-1]
    cells = (locations * sizes[:, None] + 0.5).long()
    x, y = torch.minimum(cells.clamp(min=0), sizes[:, None] - 1).unbind(-1)
    index = (starts[:, None] + y * sizes[:, :1] + x).transpose(1, 2).flatten(2)  # (B, M, N * V * P)
    rows = value.transpose(1, 2).gather(2, index.unsqueeze(-1).expand(-1, -1, -1, value.shape[-1]))
    samples = rows.unflatten(2, (locations.shape[1], -1)) * weights.transpose(1, 2).flatten(
        3
    ).unsqueeze(-1)
    out: Tensor = samples.sum(3).transpose(1, 2).flatten(2)
    return out
