"""IS, instability of the matching (DN-DETR, section 3.2): how many queries learn something else than before.

`V` holds, for each query, the ground-truth box that it is matched to, or -1. Between two snapshots of the same image,
IS is the number of entries that changed. In the paper snapshots are epochs; they may be decoder layers as well.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from detrellis.types import Assignment, Targets


def matched_boxes(found: Assignment, targets: Targets, layers: int, queries: int) -> Tensor:
    """V by layer `(L, B, N)`: the place of each query's target among those of its image, or -1."""
    v = torch.full((layers, len(targets.sizes), queries), -1, device=found.query.device)
    first = torch.tensor(targets.offsets, device=found.query.device)
    v[found.layer, found.image, found.query] = found.target - first[found.image]
    return v


def changed(v: Tensor) -> Tensor:
    """Entries of V that differ from the snapshot before: `(T, ..., N)` to `(T - 1, ...)`."""
    return (v[1:] != v[:-1]).sum(-1)


def instability(images: Iterable[Tensor]) -> Tensor:
    """IS: the mean over images of V `(T, N)`, whose N may differ: `(T - 1,)` in float64; there must be one image."""
    return torch.stack([changed(v) for v in images]).double().mean(0)
