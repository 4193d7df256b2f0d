"""Faster forms of plain modules, put in once a model has been built."""

from __future__ import annotations

from torch import Tensor, nn

from detrellis.nn.attention import PackedLinear
from detrellis.nn.kernels.linear import linear


class _FastLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _FastPackedLinear(PackedLinear):
    product = staticmethod(linear)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _FastLinear,
    PackedLinear: _FastPackedLinear,
}


def accelerate(*models: nn.Module) -> None:
    """Let the models' linear layers take oneDNN's matrix products on a CPU where they are faster
    (`nn/kernels/linear.py`).

    Each layer gets another class and keeps everything else: parameters, hooks, its name in a state
    dict. Layers of any other class stay what they are.
    """
    for module in (m for model in models for m in model.modules()):
        if fast := FAST.get(type(module)):
            module.__class__ = fast
