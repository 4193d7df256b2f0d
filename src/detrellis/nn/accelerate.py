"""Faster forms of plain modules, put in once a model has been built."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrellis.nn.attention import PackedLinear
from detrellis.nn.kernels.linear import linear
from detrellis.precision import in_bfloat16_on_cpu


class _FastLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _FastPackedLinear(PackedLinear):
    product = staticmethod(linear)


class _Single(nn.Conv2d):
    """Computes what the class after it, a convolution, does in float32 where a CPU's bfloat16 is
    slow or wrong.
    """

    def __reduce__(self) -> tuple[object, ...]:
        # Its class has no name by which it could be found again
        return _blank, (type(self).__bases__[1],), self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        if not in_bfloat16_on_cpu(x) or not (self._is_slow() or self._is_wrong(x)):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())

    def _is_slow(self) -> bool:
        return torch.is_grad_enabled() and _is_depthwise(self)

    def _is_wrong(self, x: Tensor) -> bool:
        """Whether the output may be a single column of a strided convolution: for these, oneDNN
        reads memory that nobody wrote, forwards and in the weights' gradient
        (docs/experiments/bfloat16.md).
        """
        stride, kernel, dilation = self.stride[1], self.kernel_size[1], self.dilation[1]
        # One column without any padding; a class of its own may pad where this cannot see it
        return stride > 1 and x.shape[-1] <= stride + dilation * (kernel - 1)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _FastLinear,
    PackedLinear: _FastPackedLinear,
}
# Depthwise and strided convolutions of each class, as they are needed
SINGLE: dict[type[nn.Module], type[nn.Module]] = {}


def _blank(kind: type[nn.Module]) -> nn.Module:
    """A module of that class without a state, for pickles and copies."""
    single = _single(kind)
    return single.__new__(single)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels


def _is_strided(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.stride[1] > 1


def _single(kind: type[nn.Module]) -> type[nn.Module]:
    return SINGLE.setdefault(kind, type(kind.__name__, (_Single, kind), {}))


def accelerate(*models: nn.Module) -> None:
    """Let the models' linear layers take oneDNN's matrix products on a CPU where they are faster
    (`nn/kernels/linear.py`), and their depthwise and strided convolutions float32 where a CPU's
    bfloat16 is slow or wrong.

    Each layer gets another class and keeps everything else: parameters, hooks, its name in a state
    dict. Layers of any other class stay what they are.
    """
    for module in (m for model in models for m in model.modules()):
        if fast := FAST.get(type(module)):
            module.__class__ = fast
        elif not isinstance(module, _Single) and (_is_depthwise(module) or _is_strided(module)):
            module.__class__ = _single(type(module))
