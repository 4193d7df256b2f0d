"""RT-DETR's efficient hybrid encoder (Zhao et al., CVPR 2024, section 4.2), as a neck:
from backbone maps to a memory.

Attention within the coarsest map only (AIFI), then fusion across levels by convolutions (CCFM):
coarse to fine, and back. The memory has no positions, since what reads it samples around boxes.

| deviation from the released code | why |
| --- | --- |
| AIFI's positions are those of rows and columns whatever the aspect | there they are scrambled unless maps are square |
| a map is enlarged to the finer one's size, not twofold | the same for multiples of 32 pixels, and others fit too |
| padding is no key of AIFI's attention and proposes nothing | there all pictures are stretched to one size |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.nn.constants import kept
from detrellis.nn.encoder import EncoderLayer
from detrellis.nn.fusion import ConvNorm, RepConvolution
from detrellis.nn.neck import flatten
from detrellis.types import Memory


class GridSine(nn.Module):
    """Sines and cosines of the row, then those of the column,
    counted in cells, not normalised (AIFI).
    """

    def __init__(self, width: int, *, temperature: float = 10000.0) -> None:
        super().__init__()
        self.width, self.temperature = width, temperature

    def forward(self, valid: Tensor) -> Tensor:
        """`(1, H * W, D)` for a map `valid (B, H, W)`, in its dtype."""
        height, width = valid.shape[1:]
        return _grid_sine(
            height, width, self.width // 4, self.temperature, valid.dtype, valid.device
        )


@kept(8)  # few: those of a large image are megabytes
def _grid_sine(
    height: int,
    width: int,
    features: int,
    temperature: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    index = torch.arange(features, device=device, dtype=dtype)
    frequencies = temperature ** (-index / features)
    rows, columns = (torch.arange(n, device=device, dtype=dtype) for n in (height, width))
    places = torch.cartesian_prod(rows, columns).unsqueeze(-1) * frequencies  # (H * W, 2, D / 4)
    return torch.cat([places.sin(), places.cos()], dim=-1).flatten(1).unsqueeze(0)


class CSPFusion(nn.Module):
    """RepVGG's blocks of `hidden` channels beside a 1x1 convolution (CSPRepLayer)."""

    def __init__(self, inputs: int, outputs: int, hidden: int, *, blocks: int = 3) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, hidden, activation="silu")
        self.blocks = nn.Sequential(*(RepConvolution(hidden) for _ in range(blocks)))
        self.bypass = ConvNorm(inputs, hidden, activation="silu")
        self.last = (
            ConvNorm(hidden, outputs, activation="silu") if hidden != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, outputs, H, W)`."""
        out: Tensor = self.last(self.blocks(self.first(x)) + self.bypass(x))
        return out


class ELANFusion(nn.Module):
    """Two maps of `width` side by side to one, with all that is made on the way (D-FINE's
    RepNCSPELAN4, of GELAN, YOLOv9): a half of them goes through two CSP layers of `hidden` channels
    one after the other."""

    def __init__(self, width: int, hidden: int, *, blocks: int) -> None:
        super().__init__()
        self.first = ConvNorm(2 * width, 2 * width, activation="silu")
        self.steps = nn.ModuleList(
            nn.Sequential(
                CSPFusion(inputs, hidden, hidden, blocks=blocks),
                ConvNorm(hidden, hidden, 3, activation="silu"),
            )
            for inputs in (width, hidden)
        )
        self.last = ConvNorm(2 * width + 2 * hidden, width, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 2 * D, H, W)` to `(B, D, H, W)`."""
        parts = list(self.first(x).chunk(2, dim=1))
        for step in self.steps:
            parts.append(step(parts[-1]))
        out: Tensor = self.last(torch.cat(parts, dim=1))
        return out


class FusionParts(NamedTuple):
    """What the fusion across levels is made of:
    functions of the maps' width that each make one module.
    """

    lateral: Callable[[int], nn.Module]  # of a coarse map, before it is enlarged
    down: Callable[[int], nn.Module]  # of a fine map, to half its size
    fusion: Callable[[int], nn.Module]  # of two maps side by side, to one
    output: Callable[[int, int], nn.Module]  # of a fused map, to the width of the memory


def csp_parts(blocks: int, expansion: float) -> FusionParts:
    """RT-DETR's parts."""
    return FusionParts(
        lambda width: ConvNorm(width, width, activation="silu"),
        lambda width: ConvNorm(width, width, 3, 2, activation="silu"),
        lambda width: CSPFusion(2 * width, width, int(width * expansion), blocks=blocks),
        ConvNorm,
    )


def elan_parts(blocks: int, expansion: float) -> FusionParts:
    """D-FINE's parts: nothing but fusions has activations,
    and what has the memory's width already stays as it is.
    """
    return FusionParts(
        lambda width: ConvNorm(width, width),
        lambda width: nn.Sequential(
            ConvNorm(width, width), ConvNorm(width, width, 3, 2, groups=width)
        ),
        lambda width: ELANFusion(width, round(expansion * width // 2), blocks=blocks),
        lambda inner, width: nn.Identity() if inner == width else ConvNorm(inner, width),
    )


class HybridNeck(nn.Module):
    """Backbone maps of `channels`, finest first, fused at width `inner`, as one memory of `width`.

    `layers`: AIFI's, on the coarsest map. `parts`: the modules of the fusion.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        inner: int,
        layers: Sequence[EncoderLayer],
        parts: FusionParts,
        *,
        temperature: float = 10000.0,
    ) -> None:
        super().__init__()
        fusions = range(len(channels) - 1)
        self.projections = nn.ModuleList(ConvNorm(c, inner) for c in channels)
        self.position = GridSine(inner, temperature=temperature)
        self.layers = nn.ModuleList(layers)
        self.laterals = nn.ModuleList(parts.lateral(inner) for _ in fusions)
        self.top_down = nn.ModuleList(parts.fusion(inner) for _ in fusions)
        self.downs = nn.ModuleList(parts.down(inner) for _ in fusions)
        self.bottom_up = nn.ModuleList(parts.fusion(inner) for _ in fusions)
        self.outputs = nn.ModuleList(parts.output(inner, width) for _ in channels)
        self.to(memory_format=torch.channels_last)  # a cell's channels side by side, as tokens are

    def forward(self, maps: Sequence[Tensor], padding: Tensor | None) -> Memory:
        """The memory of the backbone's `maps`,
        finest first, and the images' `padding (B, H, W)`.
        """
        return self.flatten(self.project(maps, padding), padding)

    def project(self, maps: Sequence[Tensor], padding: Tensor | None = None) -> list[Tensor]:
        """One map `(B, D, H, W)` a level.
        Convolutions run over the padded map, as a backbone's do.
        """
        levels = [project(m) for project, m in zip(self.projections, maps, strict=True)]
        levels[-1] = self.attend(levels[-1], padding)
        return [out(m) for out, m in zip(self.outputs, self.fuse_levels(levels), strict=True)]

    def flatten(self, levels: Sequence[Tensor], padding: Tensor | None) -> Memory:
        """The levels as one sequence of tokens, without positions."""
        return flatten(levels, padding)

    def attend(self, coarsest: Tensor, padding: Tensor | None) -> Tensor:
        """Attention of the cells of one map `(B, D, H, W)` to each other (AIFI)."""
        memory = flatten([coarsest], padding, self.position)
        for layer in self.layers:
            memory = layer(memory, None)
        out: Tensor = memory.tokens.transpose(1, 2).unflatten(2, coarsest.shape[-2:])
        return out

    def fuse_levels(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps `(B, D, h, w)`, finest first, that have read each other (CCFM)."""
        *finer, top = levels
        tops = []  # coarsest first: each level as the way back reads it
        for lateral, fusion, fine in zip(
            self.laterals, self.top_down, reversed(finer), strict=True
        ):
            tops.append(lateral(top))
            enlarged = F.interpolate(tops[-1], size=fine.shape[-2:], mode="nearest")
            top = fusion(torch.cat([enlarged, fine], dim=1))
        out = [top]
        for down, fusion, coarse in zip(self.downs, self.bottom_up, reversed(tops), strict=True):
            out.append(fusion(torch.cat([down(out[-1]), coarse], dim=1)))
        return out
