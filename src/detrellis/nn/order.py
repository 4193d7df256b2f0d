"""The order of equal values, which an exported graph has to keep as well."""

from __future__ import annotations

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether operations are written into a graph for another runtime."""
    return torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()


def stable_order(values: Tensor, *, descending: bool = False) -> Tensor:
    """The places that sort `values (B, N)` along `N`, those of equal ones in their order, `(B, N)`.

    ONNX has no stable sort: an exported graph gets the plain one, which becomes its TopK, and that
    puts the first of equal values first.
    """
    if exporting():
        return values.argsort(dim=1, descending=descending)
    return values.argsort(dim=1, descending=descending, stable=True)
