"""From backbone maps to one memory: project to the model's width, add coarser levels, flatten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.errors import UserError
from detrellis.nn.position import SineMap
from detrellis.types import Memory


class MapNorm(nn.GroupNorm):
    """GroupNorm of maps `(B, D, H, W)`;
    `UserError` where each group is a single number, which leaves nothing of it.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """The maps `(B, D, H, W)`, normalised in groups of channels."""
        if maps.numel() == self.num_groups:
            raise UserError(
                f"a feature map of one image is 1x1 pixels, with {self.num_channels} channels in "
                f"{self.num_groups} groups: GroupNorm has nothing to compare",
                "Take larger images (-o 'data.size=[HEIGHT, WIDTH]'), or more channels "
                f"(-o detector.width={2 * self.num_groups}).",
            )
        return super().forward(maps)


def _projection(inputs: int, width: int, *, coarser: bool) -> nn.Sequential:
    conv = (
        nn.Conv2d(inputs, width, 3, stride=2, padding=1) if coarser else nn.Conv2d(inputs, width, 1)
    )
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, MapNorm(32, width))


class MultiScaleNeck(nn.Module):
    """1x1 convolution and GroupNorm for each map; extra levels by stride-2 3x3 convolutions.

    The first extra level reads the backbone's last map, later ones the level before them. Maps that
    have the width already may stay as they are (`projected`).
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        levels: int,
        position: SineMap,
        *,
        projected: bool = True,
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            _projection(c, width, coarser=False) if projected else nn.Identity() for c in channels
        )
        extra = [channels[-1], *[width] * (levels - len(channels) - 1)][: levels - len(channels)]
        self.extra = nn.ModuleList(_projection(c, width, coarser=True) for c in extra)
        self.position = position
        self.level_embed = nn.Parameter(torch.empty(levels, width).normal_())

    def forward(self, maps: Sequence[Tensor], padding: Tensor | None) -> Memory:
        """The memory of the backbone's `maps`,
        finest first, and the images' `padding (B, H, W)`.
        """
        return self.flatten(self.project(maps), padding)

    def project(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One map `(B, D, H, W)` a level.
        GroupNorm runs over the padded map, as in the reference code.
        """
        levels = [p(m) for p, m in zip(self.projections, maps, strict=True)]
        last = maps[-1]
        for layer in self.extra:
            last = layer(last)
            levels.append(last)
        return levels

    def flatten(self, levels: Sequence[Tensor], padding: Tensor | None) -> Memory:
        """The levels as one sequence of tokens with their positions."""
        memory = flatten(levels, padding, self.position)
        embeds = [
            e.expand(h * w, -1) for e, (h, w) in zip(self.level_embed, memory.shapes, strict=True)
        ]
        return memory._replace(position=memory.position + torch.cat(embeds))


class SingleScaleNeck(nn.Module):
    """A 1x1 convolution of the backbone's last map; without a norm in DETR."""

    def __init__(self, channels: int, width: int, position: SineMap, *, norm: bool = False) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, 1)
        self.norm = MapNorm(32, width) if norm else nn.Identity()
        self.position = position

    def forward(self, maps: Sequence[Tensor], padding: Tensor | None) -> Memory:
        """The memory of the last of `maps`, and the images' `padding (B, H, W)`."""
        return self.flatten(self.project(maps), padding)

    def project(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The one level, a map `(B, D, H, W)`."""
        return [self.norm(self.projection(maps[-1]))]

    def flatten(self, levels: Sequence[Tensor], padding: Tensor | None) -> Memory:
        """The level as a sequence of tokens with their positions."""
        return flatten(levels, padding, self.position)


def flatten(
    levels: Sequence[Tensor], padding: Tensor | None, position: nn.Module | None = None
) -> Memory:
    """Maps `(B, D, H, W)` as one memory, with `padding (B, H, W)` of the images and each level's
    positions, which are 0 where nobody says them."""
    shapes = tuple((m.shape[-2], m.shape[-1]) for m in levels)
    tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in levels], dim=1)
    masks = None if padding is None else [_resize_mask(padding, s) for s in shapes]
    # A count of rows needs more than half precision has
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    if position is None:
        places = tokens.new_zeros(1, 1, 1, dtype=dtype).expand(1, *tokens.shape[1:])
    elif masks is None and isinstance(position, SineMap):
        places = torch.cat([position.unpadded(s, dtype, tokens.device) for s in shapes], dim=1)
    else:
        valid = [tokens.new_ones(1, *s) for s in shapes] if masks is None else [~m for m in masks]
        places = torch.cat([position(v.to(dtype)) for v in valid], dim=1)
    if masks is None:
        return Memory(tokens, places, shapes)
    return Memory(
        tokens,
        places,
        shapes,
        torch.cat([m.flatten(1) for m in masks], 1),
        _valid_ratios(masks, dtype),
    )


def _resize_mask(padding: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.interpolate(padding[:, None].float(), size=shape, mode="nearest")[:, 0].bool()


def _valid_ratios(masks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Valid fraction of the width and height of each level, read off its first row and column:
    `(B, V, 2)`.
    """
    ratios = [
        torch.stack([(~m[:, 0]).to(dtype).mean(1), (~m[:, :, 0]).to(dtype).mean(1)], dim=-1)
        for m in masks
    ]
    return torch.stack(ratios, dim=1)
