"""Faster forms of plain modules, put in once a model has been built."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrellis.nn.attention import PackedLinear
from detrellis.nn.kernels.linear import linear
from detrellis.precision import slow_in_bfloat16


class _FastLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _FastPackedLinear(PackedLinear):
    product = staticmethod(linear)


class _Single(nn.Module):
    """Computes what the class after it does in float32 where bfloat16 would be slow."""

    def __reduce__(self) -> tuple[object, ...]:
        # Its class has no name by which it could be found again
        return _blank, (type(self).__bases__[1],), self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if not slow_in_bfloat16(x):
            out = super().forward(x)
            return out
        with torch.autocast("cpu", enabled=False):
            out = super().forward(x.float())
        return out


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _FastLinear,
    PackedLinear: _FastPackedLinear,
}
# Depthwise convolutions of each class, as they are needed
SINGLE: dict[type[nn.Module], type[nn.Module]] = {}


def _blank(kind: type[nn.Module]) -> nn.Module:
    """A module of that class without a state, for pickles and copies."""
    single = _single(kind)
    return single.__new__(single)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels


def _single(kind: type[nn.Module]) -> type[nn.Module]:
    return SINGLE.setdefault(kind, type(kind.__name__, (_Single, kind), {}))


def accelerate(*models: nn.Module) -> None:
    """Let the models' linear layers take oneDNN's matrix products on a CPU where they are faster
    (`nn/kernels/linear.py`), and their depthwise convolutions float32.

    Each layer gets another class and keeps everything else: parameters, hooks, its name in a state
    dict. Layers of any other class stay what they are.
    """
    for module in (m for model in models for m in model.modules()):
        if fast := FAST.get(type(module)):
            module.__class__ = fast
        elif _is_depthwise(module) and not isinstance(module, _Single):
            module.__class__ = _single(type(module))
