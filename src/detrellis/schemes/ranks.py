"""Ranks within groups: of the candidates for one target."""

from __future__ import annotations

import torch
from torch import Tensor


def rank(score: Tensor, group: Tensor) -> Tensor:
    """Rank of each `score (M,)` among those of the same `group (M,)`, 0 = highest: `(M,)`; ties keep their order."""
    order = score.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    in_order = group[order]
    position = torch.arange(len(order), device=order.device)
    first = torch.searchsorted(in_order, in_order)  # where each group begins
    return torch.empty_like(order).index_put((order,), position - first)
