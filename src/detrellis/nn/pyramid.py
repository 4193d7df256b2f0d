"""Maps of several strides from a plain ViT's one:
the simple feature pyramid (Li et al., 2022), as Co-DETR has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detrellis.types import Memory


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps `(B, D, H, W)`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        """The maps, each cell normalised by itself."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _up(inputs: int, outputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [nn.Upsample(scale_factor=2), conv, ChannelNorm(outputs), nn.GELU()]


def _down(inputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, inputs, 3, stride=2, padding=1, bias=False)
    return [nn.MaxPool2d(3, stride=2, padding=1), conv, ChannelNorm(inputs), nn.GELU()]


def _tail(inputs: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, width, 1, bias=False),
        ChannelNorm(width),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        ChannelNorm(width),
    ]


def _resampled(stride: int, channels: int) -> tuple[list[nn.Module], int]:
    """What makes a map of this stride from one of stride 16, and the channels that it leaves."""
    half = channels // 2
    match stride:
        case 4:
            return [*_up(channels, half), *_up(half, half // 2)], half // 2
        case 8:
            return _up(channels, half), half
        case 32:
            return [nn.MaxPool2d(3, stride=2, padding=1)], channels
        case 64:
            return _down(channels), channels
    return [], channels


class SimplePyramid(nn.Module):
    """Maps of `width` channels, of the wanted `strides` from 4 to 64,
    from one of stride 16 with `channels`.
    """

    def __init__(self, channels: int, width: int, strides: Sequence[int]) -> None:
        super().__init__()
        for stride in strides:
            before, left = _resampled(stride, channels)
            self.add_module(
                f"p{stride.bit_length() - 1}", nn.Sequential(*before, *_tail(left, width))
            )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps, finest first, of `x (B, channels, h, w)`."""
        return [level(x) for level in self.children()]


class PyramidNeck(nn.Module):
    """A plain backbone's map as several, and the neck that reads these."""

    def __init__(self, pyramid: SimplePyramid, neck: nn.Module) -> None:
        super().__init__()
        self.pyramid, self.neck = pyramid, neck

    def forward(self, maps: Sequence[Tensor], padding: Tensor | None) -> Memory:
        """The memory of the backbone's one map, and the images' `padding (B, H, W)`."""
        memory: Memory = self.neck(self.pyramid(maps[-1]), padding)
        return memory
