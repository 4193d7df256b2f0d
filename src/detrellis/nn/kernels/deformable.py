"""Multi-scale deformable attention (Deformable DETR, Eq. 3) as one function with several paths.

| path | where | how |
| --- | --- | --- |
| compiled | CPU with a C++ compiler, training on large inputs | bags (`deformable_bag`), compiled (`deformable_cpu`) |
| eager | CPU otherwise | the same bags, not compiled |
| triton | CUDA | kernels (`deformable_triton`) |
| reference | export, torch's meta device, any other device | `grid_sample` |

All have closed-form gradients, equal to those of the reference, and save their inputs only. The
environment variable `DETRELLIS_MSDA` forces `reference`, `eager` or `compiled` (also for inference
and small inputs). Which path is taken is logged once (logger `detrellis.nn`, level INFO; WARNING
where a GPU has to do without Triton).

To `torch.compile` all paths but the reference are one opaque operation: a detector compiles without
graph breaks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from detrellis.nn.kernels import deformable_cpu
from detrellis.nn.kernels.deformable_cpu import forced, say
from detrellis.nn.kernels.deformable_reference import ms_deform_attn_reference
from detrellis.nn.order import exporting

Shapes = Sequence[tuple[int, int]]
Gradients = tuple[Tensor, Tensor, Tensor]

HAS_TRITON = find_spec("triton") is not None


def ms_deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, zero outside the map.

    `value (B, S, M, d)`, `locations (B, N, M, V, P, 2)` as (x, y) in [0, 1] of each level,
    `weights (B, N, M, V, P)`. Returns `(B, N, M * d)` in the value's type. Locations and weights
    are used in float32 or better, and so are sums. On torch's meta device only the shape comes
    out: samples and their sums are no multiply-adds that anybody counts.
    """
    if value.is_meta:
        return value.new_empty(len(value), locations.shape[1], value.shape[2] * value.shape[3])
    dtypes = (locations.dtype, weights.dtype, value.dtype)
    precise = torch.float64 if torch.float64 in dtypes else torch.float32
    locations, weights = locations.to(precise), weights.to(precise)
    if exporting() or not _has_kernels(value.device.type):
        return ms_deform_attn_reference(value.to(precise), shapes, locations, weights).to(
            value.dtype
        )
    # On CUDA, rows are converted as they are read; nothing on the CPU is faster in half precision.
    rows = value if value.is_cuda and value.dtype.itemsize == 2 else value.to(precise)
    gradients = torch.is_grad_enabled() and any(
        t.requires_grad for t in (value, locations, weights)
    )
    flat = [size for shape in shapes for size in shape]
    out: Tensor = torch.ops.detrellis.ms_deform_attn(rows, locations, weights, flat, gradients)
    return out.to(value.dtype)


def _has_kernels(device: str) -> bool:
    """Whether tensors on such a device go to the operation below;
    the reference takes the others.
    """
    usable = device == "cpu" or (device == "cuda" and HAS_TRITON)
    if forced() != "reference" and usable:
        # Where Triton does not work torch.compile would not either, and it could not trace the
        # question.
        return device == "cpu" or torch.compiler.is_compiling() or _triton_works()
    if not torch.compiler.is_compiling():
        say(f"grid_sample, on device {device}")
    return False


@cache
def _triton_works() -> bool:
    try:
        from detrellis.nn.kernels import deformable_triton

        deformable_triton.probe()
    except Exception as error:  # no C compiler for its launcher, a GPU it does not know, ...
        why = f"{type(error).__name__}: {error}"
        say(
            f"grid_sample, on device cuda, several times slower; Triton does not work: {why}",
            logging.WARNING,
        )
        return False
    say("Triton kernels, on device cuda")
    return True


def _kernels(tensor: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` are for a tensor's device."""
    if not tensor.is_cuda:
        return deformable_cpu
    from detrellis.nn.kernels import deformable_triton

    return deformable_triton


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


# Not `torch.library.custom_op`: its first call imports torch._dynamo, two seconds in every process.
torch.library.define(
    "detrellis::ms_deform_attn",
    "(Tensor value, Tensor locations, Tensor weights, SymInt[] shapes, bool gradients) -> Tensor",
)
torch.library.define(
    "detrellis::ms_deform_attn_backward",
    "(Tensor gradient, Tensor value, Tensor locations, Tensor weights, SymInt[] shapes, bool[] "
    "needs) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("detrellis::ms_deform_attn", "CompositeExplicitAutograd")
def _forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], gradients: bool
) -> Tensor:
    out: Tensor = _kernels(value).forward(value, locations, weights, _pairs(shapes), gradients)
    return out


@torch.library.impl("detrellis::ms_deform_attn_backward", "CompositeExplicitAutograd")
def _backward(
    gradient: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: list[int],
    needs: list[bool],
) -> Gradients:
    gradients: Gradients = _kernels(value).backward(
        gradient, value, locations, weights, _pairs(shapes), needs
    )
    return gradients


def _shape(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], gradients: bool
) -> Tensor:
    return value.new_empty(weights.shape[0], weights.shape[1], value.shape[2] * value.shape[3])


def _shapes(
    gradient: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: list[int],
    needs: list[bool],
) -> Gradients:
    of_value = value.new_empty(value.shape if needs[0] else 0)
    of_locations, of_weights = (
        t.new_empty(t.shape if needs[1] else 0) for t in (locations, weights)
    )
    return of_value, of_locations, of_weights


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.shapes = inputs[3]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    for_value = ctx.needs_input_grad[0]
    for_points = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    backward = torch.ops.detrellis.ms_deform_attn_backward
    of_value, *of_points = backward(
        gradient, *ctx.saved_tensors, ctx.shapes, [for_value, for_points]
    )
    return (
        of_value if for_value else None,
        *(t if for_points else None for t in of_points),
        None,
        None,
    )


torch.library.register_autograd("detrellis::ms_deform_attn", _differentiate, setup_context=_save)
torch.library.register_fake("detrellis::ms_deform_attn", _shape)
torch.library.register_fake("detrellis::ms_deform_attn_backward", _shapes)
