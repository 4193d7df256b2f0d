"""Maps of several strides from a plain ViT's one: the simple feature pyramid (Li et al., 2022), as Co-DETR has it."""

from __future__ import annotations

from torch import Tensor, nn


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


class SimplePyramid(nn.Module):
    """Five maps of `width` channels, of strides 4 to 64, from one of stride 16 with `channels`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = channels // 2
        pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        self.p2 = nn.Sequential(*_up(channels, half), *_up(half, half // 2), *_tail(half // 2, width))
        self.p3 = nn.Sequential(*_up(channels, half), *_tail(half, width))
        self.p4 = nn.Sequential(*_tail(channels, width))
        self.p5 = nn.Sequential(pool, *_tail(channels, width))
        self.p6 = nn.Sequential(*_down(channels), *_tail(channels, width))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps, finest first, of `x (B, channels, h, w)`."""
        return [level(x) for level in (self.p2, self.p3, self.p4, self.p5, self.p6)]
