"""Activation checkpointing: layers of encoders and decoders that the backward pass computes again,
instead of keeping what they computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
R = TypeVar("R")
L = TypeVar("L", bound="Recomputable")


@runtime_checkable
class Recomputable(Protocol):
    """A layer with a method that may be computed again, marked with `recomputable`."""

    recomputed: bool


def recomputable(method: Callable[Concatenate[L, P], R]) -> Callable[Concatenate[L, P], R]:
    """Of a layer that is `recomputed`, the method keeps its arguments alone for the backward pass,
    which calls it once more; with the same results, dropout included.
    """

    @wraps(method)
    def call(layer: L, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not layer.recomputed or not torch.is_grad_enabled():
            return method(layer, *args, **kwargs)
        again: Callable[..., Any] = checkpoint
        result: R = again(method, layer, *args, use_reentrant=False, **kwargs)
        return result

    return call


def recompute_layers(encoder: nn.Module, decoder: nn.Module) -> None:
    """Let the backward pass compute each layer of both again but the decoder's last one, with which
    it begins: what that one keeps is gone before anything is computed again.
    """
    modules = [*encoder.modules(), *decoder.modules()]
    *layers, _ = (module for module in modules if isinstance(module, Recomputable))
    for layer in layers:
        layer.recomputed = True
