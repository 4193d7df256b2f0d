"""Matrix products of linear layers, by oneDNN on a CPU that is not Intel's;
`nn/accelerate.py` puts them into a model.

torch multiplies float32 matrices with MKL, which on CPUs that are not Intel's runs at half the
speed of oneDNN or less, and on Intel's is faster (docs/performance.md; benchmarks/linear.py). Such
products are most of a training step. torch ships oneDNN and reaches it from compiled code only, so
this asks for the operation that compiled code asks for. It is private to torch: where it is missing
or does not work, and wherever else it has nothing to offer, `F.linear` is used.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Multiplications below which the call costs more than it wins.
WORTH = 2**22


@cache
def _faster() -> bool:
    """Whether oneDNN's product is faster than torch's own: on any CPU that is not Intel's."""
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        processor = platform.processor()
    return "GenuineIntel" not in processor


@cache
def _available() -> bool:
    """Whether oneDNN's product is there and right."""
    try:
        # Not random: the first step of a process would then draw other numbers than it does where a
        # run goes on.
        x, weight, bias = (torch.linspace(-1, 1, size) for size in (12, 20, 5))
        x, weight = x.view(3, 4), weight.view(5, 4)
        return torch.backends.mkldnn.is_available() and torch.allclose(
            _product(x, weight, bias), x @ weight.t() + bias, atol=1e-5
        )
    except Exception:  # another torch, which names it differently
        return False


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x (..., i) @ weight (o, i)^T + bias`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t()) if for_x else None,
            _product(_columns(gradient), _columns(x)) if for_weight else None,
            gradient.sum(tuple(range(gradient.dim() - 1))) if for_bias else None,
        )


def _columns(x: Tensor) -> Tensor:
    """The rows of `x (..., i)` side by side, `(i, rows)`, in one operation where it can be."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x.as_strided((width, x.numel() // width), (1, width))
    return x.reshape(-1, width).t()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`: `x (..., i)`, `weight (o, i)`, `bias (o)` to `(..., o)`.
    No second derivative on a CPU.
    """
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    single = x.dtype is weight.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    if not single or x.numel() * len(weight) < WORTH or not (_faster() and _available()):
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear`, by oneDNN on whatever CPU; float32 alone."""
    out: Tensor = _Linear.apply(x, weight, bias)
    return out
