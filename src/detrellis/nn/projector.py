"""LW-DETR's projector: from the maps of a plain backbone,
all of one stride, to the levels of a memory.

For each level the maps are resampled, put side by side, and mixed by a C2f block, as YOLOv8 has it
(LW-DETR, section 3.1); a LayerNorm of the channels follows. There is no encoder behind it. RF-DETR
has LayerNorms of the channels in place of all BatchNorms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from detrellis.nn.neck import flatten
from detrellis.nn.position import SineMap
from detrellis.types import Memory

WIDE = 512  # channels above which a map is narrowed before it is made finer
Norm = Callable[[int], nn.Module]  # of so many channels


class C2f(nn.Module):
    """A convolution, bottlenecks on half of its channels,
    one after the other, and a convolution of all of them.
    """

    def __init__(self, inputs: int, width: int, blocks: int, norm: Norm) -> None:
        super().__init__()
        half = width // 2
        self.first = conv_norm(inputs, 2 * half, norm, nn.SiLU())
        self.bottlenecks = nn.ModuleList(
            nn.Sequential(*(conv_norm(half, half, norm, nn.SiLU(), kernel=3) for _ in range(2)))
            for _ in range(blocks)
        )
        self.last = conv_norm((2 + blocks) * half, width, norm, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """A map `(B, D, h, w)` of `x (B, C, h, w)`."""
        parts = list(self.first(x).chunk(2, dim=1))
        for block in self.bottlenecks:
            parts.append(block(parts[-1]))
        out: Tensor = self.last(torch.cat(parts, dim=1))
        return out


def conv_norm(
    inputs: int,
    outputs: int,
    norm: Norm,
    activation: nn.Module,
    *,
    kernel: int = 1,
    stride: int = 1,
) -> nn.Sequential:
    """A convolution without bias, its norm, and the activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, norm(outputs), activation)


def resampler(channels: int, scale: float, norm: Norm) -> tuple[nn.Module, int]:
    """What makes a map `scale` times as high and wide (2, 1 or 0.5),
    and the channels that it leaves.
    """
    if scale == 1:
        return nn.Sequential(), channels
    if scale == 0.5:
        return nn.Sequential(
            conv_norm(channels, channels, norm, nn.ReLU(), kernel=3, stride=2)
        ), channels
    assert scale == 2
    narrow = [conv_norm(channels, channels // 2, norm, nn.ReLU())] if channels > WIDE else []
    inputs = channels // 2 if narrow else channels
    return nn.Sequential(*narrow, nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)), inputs // 2


class ScaleProjector(nn.Module):
    """One level: every map resampled, and all of them mixed."""

    def __init__(
        self, channels: Sequence[int], width: int, scale: float, blocks: int, norm: Norm
    ) -> None:
        super().__init__()
        made = [resampler(c, scale, norm) for c in channels]
        self.resamplers = nn.ModuleList(module for module, _ in made)
        self.mix = C2f(sum(left for _, left in made), width, blocks, norm)
        self.norm = LayerNorm2d(width, eps=1e-6)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The level `(B, D, H, W)` of the `maps (B, C, h, w)`."""
        resampled = [layer(m) for layer, m in zip(self.resamplers, maps, strict=True)]
        out: Tensor = self.norm(self.mix(torch.cat(resampled, dim=1)))
        return out


class Projector(nn.Module):
    """The levels of a memory, one of each of the `scales` (2, 1 or 0.5 times the maps),
    finest first.

    `layer_norm_eps`: LayerNorms of the channels with this epsilon instead of BatchNorms; None:
    BatchNorms.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        scales: Sequence[float],
        position: SineMap,
        *,
        blocks: int = 3,
        layer_norm_eps: float | None = None,
    ) -> None:
        super().__init__()

        def norm(of: int) -> nn.Module:
            return (
                nn.BatchNorm2d(of)
                if layer_norm_eps is None
                else LayerNorm2d(of, eps=layer_norm_eps)
            )

        self.levels = nn.ModuleList(
            ScaleProjector(channels, width, scale, blocks, norm) for scale in scales
        )
        self.position = position

    def forward(self, maps: Sequence[Tensor], padding: Tensor | None) -> Memory:
        """The memory of the backbone's `maps` and the images' `padding (B, H, W)`."""
        return self.flatten(self.project(maps), padding)

    def project(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One map `(B, D, H, W)` a level.
        The convolutions read padding, as in the reference code.
        """
        return [level(maps) for level in self.levels]

    def flatten(self, levels: Sequence[Tensor], padding: Tensor | None) -> Memory:
        """The levels as one sequence of tokens with their positions."""
        return flatten(levels, padding, self.position)
