"""Tensors that shapes alone decide: made once, and kept for the steps that follow.

A step is thousands of small operations, and each costs the host as much as a large one. What they
make of shapes, numbers, a type and a device is the same at every step of that shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def traced() -> bool:
    """Whether operations are written into a graph now, which must hold all of them."""
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def kept(count: int) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Keep what a function of hashable arguments made last of `count` of them.
    Nobody may write into its tensors.
    """

    def decorate(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
        def constant(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            # A later step may need it for its gradients
            with torch.inference_mode(False), torch.no_grad():
                return make(*args, **kwargs)

        once: Callable[..., Tensor] = functools.lru_cache(maxsize=count)(constant)

        @functools.wraps(make)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            return make(*args, **kwargs) if traced() else once(*args, **kwargs)

        return call

    return decorate
