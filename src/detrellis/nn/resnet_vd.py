"""ResNet-vd, RT-DETR's backbone: a ResNet-D (He et al., 2019) as PaddlePaddle has it.

Three 3x3 convolutions in the stem, the stride of a bottleneck on its 3x3 convolution, and shortcuts
that halve a map by average pooling before their 1x1 convolution. timm's `resnet50d` and `101d` are
the same; its `18d` and `34d` lack the shortcut convolution of the first stage, which published
detectors have trained. From timm's weights it starts as the identity, so that nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from detrellis.nn.backbone import (
    MEMORY,
    Backbone,
    Frozen,
    Norm,
    fill,
    first_stages,
    stage_maps,
    wanted_stages,
)
from detrellis.nn.frozen import FrozenNorm
from detrellis.nn.pretrained import Source, unreachable

NormLayer = Callable[[int], nn.Module]


class Sizes(NamedTuple):
    """Blocks of each stage, and the channels that it gives."""

    depths: tuple[int, ...]
    channels: tuple[int, ...]
    bottleneck: bool
    stem: int = 64


BASIC, WIDE = (64, 128, 256, 512), (256, 512, 1024, 2048)
SIZES = {
    "resnet18vd": Sizes((2, 2, 2, 2), BASIC, bottleneck=False),
    "resnet34vd": Sizes((3, 4, 6, 3), BASIC, bottleneck=False),
    "resnet50vd": Sizes((3, 4, 6, 3), WIDE, bottleneck=True),
    "resnet101vd": Sizes((3, 4, 23, 3), WIDE, bottleneck=True),
}


def timm_name(name: str) -> str:
    """The timm model whose weights a ResNet-vd starts from."""
    return name.removesuffix("vd") + "d"


class ResNetVD(Backbone):
    """A ResNet-vd that returns the maps of the wanted strides.

    `norm="frozen"` fixes statistics and affine of every BatchNorm and freezes the stem, as RT-DETR
    does with the two larger ones; `norm="batch"` trains all, as it does with the others. `frozen`
    stages and the stem are not trained. `sizes`: those of another one, which nobody has published
    weights of.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int],
        *,
        pretrained: Source | None,
        norm: Norm,
        frozen: Frozen = 0,
        sizes: Sizes | None = None,
    ) -> None:
        super().__init__()
        sizes = sizes or SIZES[name]
        body = _Body(sizes, FrozenNorm if norm == "frozen" else nn.BatchNorm2d)
        if pretrained is not None:
            fill(
                body,
                _weights(name, pretrained, sizes),
                pretrained,
                name,
                partial(_Body, sizes, nn.BatchNorm2d),
            )
        self.stem = nn.Sequential(
            body.conv1, body.bn1, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.wanted, self.stages = wanted_stages(body, name, strides)
        self.channels = [sizes.channels[list(self.stages).index(part)] for part in self.wanted]
        if norm == "frozen":
            self.stem.requires_grad_(False)
        if frozen:
            self._freeze([self.stem, *first_stages(list(self.stages.values()), frozen, name)])
        self.to(memory_format=MEMORY)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps `(B, C, h, w)` of `pixels (B, 3, H, W)`, finest first."""
        return stage_maps(self.stem, self.stages, self.wanted, pixels)


class _Body(nn.Module):
    """Stem and stages under the names that everybody has for them."""

    def __init__(self, sizes: Sizes, norm: NormLayer) -> None:
        super().__init__()
        half = sizes.stem // 2
        self.conv1 = nn.Sequential(
            *(_convolution(3, half, 3, 2), norm(half), nn.ReLU(inplace=True)),
            *(_convolution(half, half, 3), norm(half), nn.ReLU(inplace=True)),
            _convolution(half, sizes.stem, 3),
        )
        self.bn1 = norm(sizes.stem)
        inputs = sizes.stem
        for stage, (depth, channels) in enumerate(zip(sizes.depths, sizes.channels, strict=True)):
            blocks = [
                _block(inputs if i == 0 else channels, channels, stage, i, sizes, norm)
                for i in range(depth)
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = channels


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _block(
    inputs: int, outputs: int, stage: int, index: int, sizes: Sizes, norm: NormLayer
) -> nn.Module:
    """One residual block; the first of a stage has a shortcut,
    and but for the first stage halves the map.
    """
    shortcut, stride = None, 1
    if index == 0:
        stride = 1 if stage == 0 else 2
        pool = (
            nn.Identity()
            if stride == 1
            else nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        )
        shortcut = nn.Sequential(pool, _convolution(inputs, outputs, 1), norm(outputs))
    make, planes = (
        (Bottleneck, outputs // Bottleneck.expansion) if sizes.bottleneck else (BasicBlock, outputs)
    )
    block: nn.Module = make(inputs, planes, stride, shortcut, norm_layer=norm)
    for part in block.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return block


def _weights(name: str, source: Source, sizes: Sizes) -> dict[str, Tensor]:
    """Those of the source; the first stage's shortcut is the identity where it has none."""
    weights = dict(_fetched(name)) if source.file is None else source.read()
    shortcut, width = "layer1.0.downsample.{}", sizes.channels[0]
    if not sizes.bottleneck and shortcut.format("1.weight") not in weights:
        norm = nn.BatchNorm2d(width)
        nn.init.constant_(norm.weight, math.sqrt(1 + norm.eps))
        weights[shortcut.format("1.weight")] = torch.eye(width)[:, :, None, None]
        weights |= {shortcut.format(f"2.{key}"): value for key, value in norm.state_dict().items()}
    return weights


def _fetched(name: str) -> Mapping[str, Tensor]:
    """What timm fetches."""
    import timm

    try:
        weights: Mapping[str, Tensor] = timm.create_model(
            timm_name(name), pretrained=True
        ).state_dict()
    except (OSError, RuntimeError) as error:
        raise unreachable(name, error) from None
    return weights
