"""How far apart groups of queries are (Group DETR, section 5):
positions anywhere (PD), and those of one target (MD).

Positions are centres in [0, 1]: reference points, anchors, or proposals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detrellis.types import Assignment


def _pairs(groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(groups, groups, 1, device=device)
    return first, second


def position_distance(positions: Tensor) -> Tensor:
    """PD (Eq. 6) of each pair of groups, (0, 1), (0, 2), ...: `(..., K, N, 2)` to `(..., P)`.

    The mean distance of a query to the nearest one of the other group, averaged over both
    directions.
    """
    first, second = _pairs(positions.shape[-3], positions.device)
    apart = torch.cdist(positions[..., first, :, :], positions[..., second, :, :])
    return (apart.amin(-1).mean(-1) + apart.amin(-2).mean(-1)) / 2


def matched_positions(positions: Tensor, assignments: Sequence[Assignment], targets: int) -> Tensor:
    """Where each group's query for each target is: `(K, T, 2)`, NaN where it has none.

    `positions (B, K, N, 2)`; `assignments` are the first group's assignment and that of all others;
    of the last layer.
    """
    _, groups, count, _ = positions.shape
    matched = positions.new_full((groups, targets, 2), torch.nan)
    for first, rows in enumerate(assignments):
        rows = (
            Assignment(*(t[rows.layer == rows.layer.max()] for t in rows))
            if len(rows.layer)
            else rows
        )
        group, query = first + rows.query // count, rows.query % count
        matched[group, rows.target] = positions[rows.image, group, query]
    return matched


def matched_distance(matched: Tensor) -> Tensor:
    """MD (Eq. 7) of each pair of groups: `(K, T, 2)` to `(P,)`.

    The mean over the targets of the distance between the two queries that are matched to it.
    """
    first, second = _pairs(len(matched), matched.device)
    apart: Tensor = torch.linalg.vector_norm(matched[first] - matched[second], dim=-1)
    return apart.nanmean(-1)
