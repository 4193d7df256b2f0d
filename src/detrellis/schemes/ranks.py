"""Ranks within groups: of the candidates for one target."""

from __future__ import annotations

import torch
from torch import Tensor


def rank(score: Tensor, group: Tensor) -> Tensor:
    """Rank of each `score (M,)` among those of the same `group (M,)`, 0 = highest:
    `(M,)`; ties keep their order.
    """
    order, first = _by_group(score, group)
    position = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).index_put((order,), position - first)


def highest(score: Tensor, group: Tensor) -> Tensor:
    """The highest `score (M,)` among those of the same `group (M,)`, for each: `(M,)`."""
    order, first = _by_group(score, group)
    return torch.empty_like(score).index_put((order,), score[order][first])


def _by_group(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """What sorts by group, and by falling score within each,
    and where in that order each one's group begins.
    """
    order = score.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    in_order = group[order]
    return order, torch.searchsorted(in_order, in_order)
