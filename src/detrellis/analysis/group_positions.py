"""Where the queries of groups are in some images: how far apart, and how alike the groups are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis.analysis.instability import matched_boxes
from detrellis.analysis.outputs import last_layer, one_to_one
from detrellis.analysis.schemes import AllGroups
from detrellis.data.batch import Batch
from detrellis.schemes.distances import matched_distance, matched_positions, position_distance
from detrellis.training import TrainableDetector

GRID = 8  # cells of a histogram on each side
SHUFFLES = 10  # random groups that the histogram distance is compared with


def histograms(positions: Tensor, grid: int = GRID) -> Tensor:
    """What fraction of each group's positions is in each cell, row by row from the top:
    `(..., K, N, 2)` to `(..., K, grid^2)`."""
    column, row = (positions * grid).long().clamp(0, grid - 1).unbind(-1)
    cells = F.one_hot(row * grid + column, grid**2)
    return cells.double().mean(-2)


def total_variation(histograms: Tensor) -> Tensor:
    """Half the L1 distance of the distributions of each pair of groups:
    `(..., K, G)` to `(..., P)`, 0 to 1.
    """
    groups = histograms.shape[-2]
    first, second = torch.triu_indices(groups, groups, 1, device=histograms.device)
    return (histograms[..., first, :] - histograms[..., second, :]).abs().sum(-1) / 2


def dealt(positions: Tensor, shuffles: int = SHUFFLES) -> Tensor:
    """The same positions, dealt to groups at random:
    `(..., K, N, 2)` to `(shuffles, ..., K, N, 2)`.
    """
    generator = torch.Generator().manual_seed(0)
    groups, count = positions.shape[-3:-1]
    together = positions.flatten(-3, -2)
    deals = []
    for _ in range(shuffles):
        order = torch.randperm(groups * count, generator=generator).to(positions.device)
        deals.append(together[..., order, :].unflatten(-2, (groups, count)))
    return torch.stack(deals)


class GroupPositions(NamedTuple):
    """Where the queries of some images are; or of one, where they are the same in all."""

    first: Tensor  # (K, N, 2) positions in the first image
    histograms: Tensor  # (n, K, grid^2)
    distance: Tensor  # (n,) of the histograms: mean over pairs
    random: Tensor  # (n,) the same for random groups
    pd: Tensor  # (n,) mean over pairs

    @classmethod
    def of(cls, positions: Tensor, grid: int) -> GroupPositions:
        """From `(n, K, N, 2)`; on the host."""
        cells = histograms(positions, grid)
        distance = total_variation(cells).mean(-1)
        random = total_variation(histograms(dealt(positions), grid)).mean((0, -1))
        pd = position_distance(positions).mean(-1)
        return cls(*(t.cpu() for t in (positions[0], cells, distance, random, pd)))

    @classmethod
    def joined(cls, parts: Sequence[GroupPositions]) -> GroupPositions:
        """Those of several batches together."""
        first, *columns = zip(*parts, strict=True)
        return cls(first[0], *(torch.cat(column) for column in columns))


class BatchGroups(NamedTuple):
    """What one batch says of the groups, on the host."""

    positions: GroupPositions | None  # None: no positions, or those of an earlier batch
    matched: Tensor | None  # (K, T, 2) positions of each group's queries for each box
    v: list[Tensor]  # of each image, (L, N): what the first group's queries are matched to


def batch_groups(
    model: TrainableDetector, outputs: AllGroups, batch: Batch, grid: int | None
) -> BatchGroups:
    """What a batch says of the groups; `grid` is None where the positions are known."""
    targets, supervision = batch.targets, model.supervision
    # Queries that predict masks alone have no place, and are matched by masks
    if not outputs.output.boxes.shape[-1]:
        return BatchGroups(None, None, [])
    assignment = one_to_one(supervision, outputs.of(0), targets)
    v = matched_boxes(assignment, targets, len(outputs.output.logits), outputs.queries)
    images = list(v.cpu().unbind(1))
    if outputs.positions is None:
        return BatchGroups(None, None, images)
    last = one_to_one(supervision, last_layer(outputs.output), targets, outputs.groups)
    matched = matched_positions(outputs.positions, [last], len(targets.labels)).cpu()
    new = outputs.positions[:1] if outputs.fixed else outputs.positions
    return BatchGroups(None if grid is None else GroupPositions.of(new, grid), matched, images)


def distances(parts: Sequence[BatchGroups]) -> dict[str, Any]:
    """The fields of `RunGroups` about positions."""
    positions = [part.positions for part in parts if part.positions is not None]
    if not positions:
        return dict.fromkeys(("positions", "shares", "distance", "random", "pd", "md"))
    joined = GroupPositions.joined(positions)
    md = matched_distance(
        torch.cat([part.matched for part in parts if part.matched is not None], dim=1)
    ).nanmean()
    return {
        "positions": tuple(
            tuple((round(x, 5), round(y, 5)) for x, y in group) for group in joined.first.tolist()
        ),
        "shares": tuple(map(tuple, joined.histograms.mean(0).tolist())),
        "distance": float(joined.distance.mean()),
        "random": float(joined.random.mean()),
        "pd": float(joined.pd.double().mean()),
        "md": float(md) if md.isfinite() else None,
    }
