"""Bipartite matching: the cost on the device, one copy to the host a step, Hungarian there, one copy back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, pairwise_giou
from detrellis.types import Assignment, DecoderOutput, Targets

WORST = 1e8  # stands for a cost that is not a number, which the solver would refuse
CACHED = 2**18  # costs that a CPU computes at a time: the dozen arrays on the way to them stay in its cache


# (logits (..., N, C), labels (..., T), GIoU (..., N, T)) to the unweighted class term (..., N, T)
ClassTerm = Callable[[Tensor, Tensor, Tensor], Tensor]


def columns(values: Tensor, labels: Tensor) -> Tensor:
    """The targets' classes of `values (..., N, C)`: `(..., N, T)`."""
    return values.gather(-1, labels.unsqueeze(-2).expand(*values.shape[:-1], labels.shape[-1]))


def focal_term(logits: Tensor, labels: Tensor, overlap: Tensor) -> Tensor:
    """Focal loss of the class being present minus that of its being absent.

    The targets' class columns are gathered before the sigmoid, so the cost does not grow with the number of classes.
    """
    return focal_difference(columns(logits, labels).sigmoid())


def focal_difference(p: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The same of probabilities, with the reference code's 1e-8."""
    present = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    absent = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return present - absent


def _planes(boxes: Tensor) -> Tensor:
    """The same `(..., 4)`, in memory one coordinate after the other: arithmetic on coordinates then strides by 1."""
    return boxes.movedim(-1, 0).contiguous().movedim(0, -1)


def softmax_term(logits: Tensor, labels: Tensor, overlap: Tensor) -> Tensor:
    """DETR's class term: minus the softmax probability of the target's class."""
    return -columns(logits.softmax(-1), labels)


@dataclass(frozen=True)
class MatchingCost:
    """DETR's matching cost: weighted class term, L1 and generalised IoU, over the targets only."""

    classes: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    class_term: ClassTerm = focal_term

    def __call__(self, logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """`logits (..., N, C)`, `boxes (..., N, 4)`, `labels (..., T)`, `targets (..., T, 4)` to `(..., N, T)`."""
        overlap = pairwise_giou(_planes(cxcywh_to_xyxy(boxes)), _planes(cxcywh_to_xyxy(targets)))
        distance = torch.cdist(boxes, targets, p=1)
        classes = self.class_term(logits, labels, overlap)
        return self.classes * classes + self.l1 * distance - self.giou * overlap


@dataclass(frozen=True)
class Candidates:
    """How many queries each target gets at each stage: Align-DETR's k.

    `share` caps it in crowded images, each for itself: at most that part of the queries become positives, but every
    target gets one. None: no cap; if the queries do not suffice, the targets get unequal numbers.
    """

    encoder: int = 1
    intermediate: int = 1
    last: int = 1
    share: float | None = 0.5

    def of(self, layer: int, layers: int, *, queries: int, targets: int) -> int:
        """The number at decoder layer `layer` of `layers`, in an image of so many targets."""
        k = self.last if layer == layers - 1 else self.intermediate
        if self.share is None:
            return k
        return max(1, min(k, int(self.share * queries) // max(targets, 1)))


@dataclass(frozen=True)
class Hungarian:
    """Assign by optimal matching on `cost`, at each layer and within each copy of a block.

    One-to-one, or each target to several queries: then every target stands that often in the cost.
    """

    cost: MatchingCost = MatchingCost()
    candidates: Candidates = Candidates()

    def for_proposals(self) -> Hungarian:
        """The same for the encoder's proposals."""
        return replace(self, candidates=replace(self.candidates, last=self.candidates.encoder))


@dataclass(frozen=True)
class Known:
    """An assignment that needs no matching: denoising queries know their target."""

    assignment: Assignment


Assign = Hungarian | Known


@dataclass(frozen=True)
class Match:
    """One block's matching problem."""

    output: DecoderOutput
    targets: Targets
    assign: Assign
    copies: int = 1


def _pad(targets: Targets) -> tuple[Tensor, Tensor]:
    """Labels `(B, T)` and boxes `(B, T, 4)` of each image, filled up to the largest count with its last target.

    Not with zeros: a class term may look for the best overlap of an image.
    """
    most, total = max(targets.sizes), len(targets.labels)
    rows = [min(o + min(j, max(n - 1, 0)), total - 1) for o, n in _spans(targets) for j in range(most)]
    index = torch.tensor(rows, device=targets.labels.device).view(-1, most)
    return targets.labels[index], targets.boxes[index]


def _spans(targets: Targets) -> zip[tuple[int, int]]:
    return zip(targets.offsets, targets.sizes, strict=True)


def _shape(match: Match) -> tuple[int, int, int, int]:
    """Layers, images, copies, queries of a copy."""
    layers, batch, queries, _ = match.output.logits.shape
    return layers, batch, match.copies, queries // match.copies


def _costs(match: Match, cost: MatchingCost) -> list[Tensor]:
    """Costs `(l, b, K, N / K, T)` of some layers and images at a time, in order; in float32 or better."""
    layers, batch, copies, queries = _shape(match)
    labels, boxes = _pad(match.targets)
    logits, predicted = (
        t.detach().to(boxes.dtype).reshape(layers, batch, copies, queries, -1) for t in match.output[:2]
    )
    labels = labels[None, :, None].expand(layers, batch, copies, -1)
    boxes = boxes[None, :, None].expand(layers, batch, copies, -1, -1)
    together = layers * batch
    if boxes.device.type == "cpu":
        together = max(CACHED // (copies * queries * labels.shape[-1]), 1)
    rows, columns = max(together // batch, 1), min(together, batch)
    parts = itertools.product(range(0, layers, rows), range(0, batch, columns))
    return [cost(*(t[i : i + rows, j : j + columns] for t in (logits, predicted, labels, boxes))) for i, j in parts]


@torch.no_grad()
def assign(matches: Sequence[Match]) -> list[Assignment]:
    """Solve every block's matching with one copy to the host and one back."""
    solvable = [(m, m.assign.cost) for m in matches if isinstance(m.assign, Hungarian) and len(m.targets.labels)]
    with torch.autocast(matches[0].output.boxes.device.type, enabled=False):
        costs = [_costs(m, c) for m, c in solvable]
    if not costs:
        return [m.assign.assignment if isinstance(m.assign, Known) else _nothing(m) for m in matches]
    flat = torch.cat([part.flatten() for parts in costs for part in parts])
    arrays = np.split(flat.cpu().numpy(), np.cumsum([sum(p.numel() for p in parts) for parts in costs])[:-1])
    rows = [_solve(a.reshape(*_shape(m), -1), m) for a, (m, _) in zip(arrays, solvable, strict=True)]
    packed = torch.from_numpy(np.concatenate(rows, axis=1)).to(flat.device, non_blocking=True)
    solved = iter(packed.split([r.shape[1] for r in rows], dim=1))
    found = {id(m): Assignment(*next(solved)) for m, _ in solvable}
    known = {id(m): m.assign.assignment for m in matches if isinstance(m.assign, Known)}
    return [found.get(id(m)) or known.get(id(m)) or _nothing(m) for m in matches]


def _nothing(match: Match) -> Assignment:
    empty = torch.zeros(5, 0, dtype=torch.int64, device=match.output.boxes.device)
    return Assignment(*empty)


def _solve(costs: NDArray[np.floating], match: Match) -> NDArray[np.int64]:
    """Rows layer, image, query, target, bag of the optimal matchings of `costs (L, B, K, N, T)`, in query order.

    Costs that are not finite are overwritten.
    """
    assert isinstance(match.assign, Hungarian)
    targets, candidates = match.targets, match.assign.candidates
    layers, batch, copies, queries, _ = costs.shape
    finite = np.nan_to_num(costs, copy=False, nan=WORST, posinf=WORST, neginf=-WORST)
    rows = []
    for place, (layer, image, copy) in enumerate(np.ndindex(layers, batch, copies)):
        size = targets.sizes[image]
        k = candidates.of(layer, layers, queries=queries, targets=size)
        query, column = linear_sum_assignment(np.tile(finite[layer, image, copy, :, :size], k))
        target = column % size + targets.offsets[image]
        row = np.empty((5, len(query)), dtype=np.int64)
        row[0], row[1] = layer, image
        row[2], row[3] = query + copy * queries, target
        row[4] = target + place * len(targets.labels)
        rows.append(row)
    return np.concatenate(rows, axis=1)
