"""Orders that every runtime computes alike: in an exported graph there is no stable sort."""

from __future__ import annotations

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether operations are written into a graph for another runtime."""
    return torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()


def at_hand(x: Tensor) -> bool:
    """Whether the host reads the numbers of `x` without a wait: not those of a GPU, which may have
    to compute them first, nor those of an exported graph, where there are none."""
    return x.device.type == "cpu" and not exporting()


def best_first(scores: Tensor) -> Tensor:
    """The places `(B, N)` of `scores (B, N)`, the highest first, those of equal ones in their order.

    In an exported graph equal ones come in any order.
    """
    if exporting():
        return scores.argsort(dim=1, descending=True)
    return scores.argsort(dim=1, descending=True, stable=True)


def behind(last: Tensor) -> Tensor:
    """The places of `last (B, N)` bool,
    those that are True behind all others, and either in their order, `(B, N)`.
    """
    count = last.shape[1]
    places = torch.arange(2 * count, device=last.device)
    return torch.where(last, places[count:], places[:count]).argsort(dim=1)  # no two are equal
