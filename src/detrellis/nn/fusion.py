"""Convolutions with BatchNorm, and RepVGG's blocks:
several branches in training, one convolution at inference.

BatchNorm is linear once its statistics stand still, and so is the sum of parallel convolutions:
`fuse` computes what they come to together. The outputs stay the same up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from detrellis.nn.mlp import ACTIVATIONS, Activation


class ConvNorm(nn.Module):
    """A convolution without bias that keeps the size (or divides it by `stride`),
    BatchNorm, and an activation.
    """

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
        self.convolution = nn.Conv2d(
            inputs, outputs, kernel, stride, padding, groups=groups, bias=False
        )
        self.norm: nn.Module = nn.BatchNorm2d(outputs)
        self.activation = nn.Identity() if activation is None else ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, outputs, h, w)` of `x (B, inputs, H, W)`."""
        out: Tensor = self.activation(self.norm(self.convolution(x)))
        return out


class RepConvolution(nn.Module):
    """RepVGG's block (Ding et al., CVPR 2021) without its identity:
    a 3x3 and a 1x1 convolution side by side.
    """

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

    def merge(self) -> None:
        """Make one 3x3 convolution of both branches, whose norms are fused;
        nothing happens the second time.
        """
        if self.point is None:
            return
        wide, point = self.wide.convolution, self.point.convolution
        assert wide.bias is not None
        assert point.bias is not None
        wide.weight.data += F.pad(point.weight.data, (1, 1, 1, 1))
        wide.bias.data += point.bias.data
        self.point = None


# Of torch, ours (also in the place of those that timm freezes) and timm, whose import takes a
# second: by name.
NORMS = {
    "BatchNorm2d",
    "SyncBatchNorm",
    "FrozenNorm",
    "FrozenNormAct",
    "BatchNormAct2d",
}


def fuse(module: nn.Module, run: Callable[[], object]) -> None:
    """Fuse all that can be in a module, whoever wrote it: each convolution with the BatchNorm that
    alone reads what it gives, and then RepVGG's branches.

    The module is in evaluation mode, and `run` runs it on any input: which norm reads which
    convolution is seen then.
    """
    flow = _Flow(module)
    with flow:
        run()
    for hook in flow.hooks:
        hook.remove()
    names = {part: name for name, part in module.named_modules()}
    for convolution, norm in flow.pairs():
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        convolution.weight, convolution.bias = weight, bias
        parent, _, place = names[norm].rpartition(".")
        # Timm's have an activation
        setattr(module.get_submodule(parent), place, nn.Sequential(*norm.children()))
    for part in list(module.modules()):
        if isinstance(part, RepConvolution):
            part.merge()


class _Flow(TorchFunctionMode):
    """Which norm reads which convolution, while a module runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # By id of the tensor, which is kept: no other gets its id
        self.given: dict[int, tuple[nn.Conv2d, Tensor]] = {}
        self.read_by: dict[int, Any] = {}  # norms, by id of the tensor
        self.reads, self.calls = Counter[int](), Counter[nn.Module]()
        watched = [
            part
            for part in module.modules()
            if isinstance(part, nn.Conv2d) or type(part).__name__ in NORMS
        ]
        self.hooks = [part.register_forward_hook(self._saw) for part in watched]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what a function reads of which it makes a tensor;
        others ask for a shape, a device and so on.
        """
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.reads.update(
                id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.given
            )
        return result

    def _saw(self, part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls[part] += 1
        if isinstance(part, nn.Conv2d):
            self.given[id(output)] = (part, output)
        else:
            self.read_by[id(inputs[0])] = part

    def pairs(self) -> list[tuple[nn.Conv2d, Any]]:
        """Each convolution that ran once,
        with the norm that ran once and alone reads what it gave.
        """
        candidates = [
            (part, self.read_by[key])
            for key, (part, _) in self.given.items()
            if key in self.read_by
        ]
        alone = {id(part) for key, (part, _) in self.given.items() if self.reads[key] == 1}
        return [
            (part, norm)
            for part, norm in candidates
            if id(part) in alone and self.calls[part] == self.calls[norm] == 1
        ]
