"""Convolutions with BatchNorm, and RepVGG's blocks: several branches in training, one convolution at inference.

BatchNorm is linear once its statistics stand still, and so is the sum of parallel convolutions: `fuse` computes what
they come to together. The outputs stay the same up to rounding.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from detrellis.nn.mlp import ACTIVATIONS, Activation


class ConvNorm(nn.Module):
    """A convolution without bias that keeps the size (or divides it by `stride`), BatchNorm, and an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        padding = (kernel - 1) // 2
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)
        self.activation = nn.Identity() if activation is None else ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, outputs, h, w)` of `x (B, inputs, H, W)`."""
        out: Tensor = self.activation(self.norm(self.convolution(x)))
        return out

    def fuse(self) -> None:
        """Make one convolution of both, in evaluation mode; nothing happens the second time."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.convolution = fuse_conv_bn_eval(self.convolution, self.norm)
            self.norm = nn.Identity()


class RepConvolution(nn.Module):
    """RepVGG's block (Ding et al., CVPR 2021) without its identity: a 3x3 and a 1x1 convolution side by side."""

    def __init__(self, width: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.wide = ConvNorm(width, width, 3)
        self.point: ConvNorm | None = ConvNorm(width, width, 1)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, D, H, W)` of maps like them."""
        total = self.wide(x) if self.point is None else self.wide(x) + self.point(x)
        out: Tensor = self.activation(total)
        return out

    def fuse(self) -> None:
        """Make one 3x3 convolution of both branches, in evaluation mode; nothing happens the second time."""
        if self.point is None:
            return
        self.wide.fuse()
        self.point.fuse()
        wide, point = self.wide.convolution, self.point.convolution
        assert wide.bias is not None
        assert point.bias is not None
        wide.weight.data += F.pad(point.weight.data, (1, 1, 1, 1))
        wide.bias.data += point.bias.data
        self.point = None


def fuse(module: nn.Module) -> None:
    """Fuse every part of a module that can be."""
    for part in list(module.modules()):
        if isinstance(part, ConvNorm | RepConvolution):
            part.fuse()
