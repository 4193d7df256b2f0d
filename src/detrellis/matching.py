"""Bipartite matching: the cost on the device,
one copy to the host a step, Hungarian there, one copy back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, pairwise_giou, pairwise_iou
from detrellis.mask_points import MaskCost, Sampling
from detrellis.types import Assignment, DecoderOutput, Targets

WORST = 1e8  # stands for a cost that is NaN or infinite, which the solver would refuse
# Costs that a CPU computes at a time: the dozen arrays on the way to them stay in its cache
CACHED = 2**18

# (logits (..., N, C), labels (..., T), GIoU (..., N, T)) to the unweighted class term (..., N, T).
ClassTerm = Callable[[Tensor, Tensor, Tensor], Tensor]


def columns(values: Tensor, labels: Tensor) -> Tensor:
    """The targets' classes of `values (..., N, C)`: `(..., N, T)`."""
    return values.gather(-1, labels.unsqueeze(-2).expand(*values.shape[:-1], labels.shape[-1]))


def focal_term(logits: Tensor, labels: Tensor, overlap: Tensor) -> Tensor:
    """Focal loss of the class being present minus that of its being absent.

    The targets' class columns are gathered before the sigmoid, so the cost does not grow with the
    number of classes.
    """
    return focal_difference(columns(logits, labels).sigmoid())


def focal_difference(p: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """As `focal_term`, of the probabilities `p` of the targets' classes;
    the 1e-8 is the reference code's.
    """
    present = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    absent = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return present - absent


def softmax_term(logits: Tensor, labels: Tensor, overlap: Tensor) -> Tensor:
    """DETR's class term: minus the softmax probability of the target's class."""
    return -columns(logits.softmax(-1), labels)


@dataclass(frozen=True)
class MatchingCost:
    """DETR's matching cost: the weighted sum of class term,
    L1 distance and minus generalised IoU.
    """

    classes: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    class_term: ClassTerm = focal_term

    def __call__(self, logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """`logits (..., N, C)`, `boxes (..., N, 4)`,
        `labels (..., T)`, `targets (..., T, 4)` to `(..., N, T)`.

        Of boxes `(..., N, 0)`, which a detector of masks gives, the class term alone.
        """
        if not boxes.shape[-1]:
            return self.classes * self.class_term(logits, labels, logits.new_zeros(0))
        overlap = pairwise_giou(_planes(cxcywh_to_xyxy(boxes)), _planes(cxcywh_to_xyxy(targets)))
        distance = torch.cdist(boxes, targets, p=1)
        classes = self.class_term(logits, labels, overlap)
        return self.classes * classes + self.l1 * distance - self.giou * overlap


def _planes(boxes: Tensor) -> Tensor:
    """Equal boxes `(..., 4)`, in memory one coordinate after the other:
    arithmetic on coordinates then strides by 1.
    """
    return boxes.movedim(-1, 0).contiguous().movedim(0, -1)


@dataclass(frozen=True)
class Candidates:
    """How many queries each target gets at each stage: Align-DETR's k.

    `positive_fraction` caps it in crowded images, each for itself: at most that part of the queries
    become positives, but every target gets one. None: no cap; if the queries do not suffice, the
    targets get unequal numbers.
    """

    encoder: int = 1
    intermediate: int = 1
    last: int = 1
    positive_fraction: float | None = 0.5

    def of(self, layer: int, layers: int, *, queries: int, targets: int) -> int:
        """The number at decoder layer `layer` of `layers`, in an image of so many targets."""
        k = self.last if layer == layers - 1 else self.intermediate
        if self.positive_fraction is None:
            return k
        return max(1, min(k, int(self.positive_fraction * queries) // max(targets, 1)))


@dataclass(frozen=True)
class Hungarian:
    """Assign by optimal matching on `cost`, at each layer and within each copy of a block.

    One-to-one, or each target to several queries: then every target stands that often in the cost.
    `masks` is what masks add to it, where they are learned.
    """

    cost: MatchingCost = MatchingCost()
    candidates: Candidates = Candidates()
    # Boxes learn by the union of the matches of all layers, and of what stands before them
    union: bool = False
    masks: MaskCost | None = None

    def for_proposals(self) -> Hungarian:
        """This rule for the encoder's proposals, which are one layer:
        with the encoder's number of candidates.
        """
        return replace(self, candidates=replace(self.candidates, last=self.candidates.encoder))

    def for_initial(self) -> Hungarian:
        """This rule for the first layer's boxes before there are distributions:
        with that layer's candidates.
        """
        return replace(self, candidates=replace(self.candidates, last=self.candidates.intermediate))

    def solve(
        self, costs: NDArray[np.floating], layer: int, layers: int
    ) -> tuple[NDArray[np.int64], ...]:
        """Queries and targets of the pairs `(M,)`, in query order,
        by `costs (N, T)` of one layer, image and copy.
        """
        queries, targets = costs.shape
        # Each target stands k times in the cost.
        k = self.candidates.of(layer, layers, queries=queries, targets=targets)
        query, column = linear_sum_assignment(np.tile(costs, k))
        return query, column % max(targets, 1)


@dataclass(frozen=True)
class Dynamic:
    """As many queries for each target as fit it:
    the one-to-many rule of MS-DETR and DAC-DETR, at each layer.

    A query's score for a target is `(1 - overlap) p + overlap IoU`. It is a positive of the target
    that it scores highest for, if that score reaches the `threshold`, or if it is that target's
    best query. Of more positives than `positive_fraction` of the queries a random part stays. A
    target with n of them then gets its min(n, k) best queries, whichever: one may learn several
    targets, its rows in the order of their scores.

    `draw` gives a random order of so many.
    """

    draw: Callable[[int], NDArray[np.int64]]
    k: int = 6
    threshold: float = 0.4
    overlap: float = 0.7
    positive_fraction: float = 0.25

    def cost(self, logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Minus the scores; shapes as in `MatchingCost`."""
        ious = pairwise_iou(_planes(cxcywh_to_xyxy(boxes)), _planes(cxcywh_to_xyxy(targets)))
        return -(1 - self.overlap) * columns(logits, labels).sigmoid() - self.overlap * ious

    def for_initial(self) -> Dynamic:
        """See `Hungarian.for_initial`."""
        return self

    def solve(
        self, costs: NDArray[np.floating], layer: int, layers: int
    ) -> tuple[NDArray[np.int64], ...]:
        """As `Hungarian.solve`; rows of a query by rising score."""
        queries, targets = costs.shape
        if not targets:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        # The positives, and how many each target has.
        positive = costs.min(axis=1) <= -self.threshold
        positive[costs.argmin(axis=0)] = True
        rows, limit = positive.nonzero()[0], int(queries * self.positive_fraction)
        if len(rows) > limit:
            rows = rows[self.draw(len(rows))[:limit]]
        counts = np.bincount(costs.argmin(axis=1)[rows], minlength=targets)
        # Each target's best queries, that many.
        order = costs.argsort(axis=0, kind="stable")
        rank, column = (np.arange(queries)[:, None] < np.minimum(counts, self.k)).nonzero()
        query = order[rank, column]
        by_query = np.lexsort((-costs[query, column], query))
        return query[by_query], column[by_query]


@dataclass(frozen=True)
class Known:
    """An assignment that needs no matching: denoising queries know their target."""

    assignment: Assignment
    # Positives of each image at each layer, on the host; empty: not counted
    counts: tuple[int, ...] = ()

    def for_initial(self, layers: int) -> Known:
        """The first of `layers` layers' part, which all have alike, one after the other."""
        rows = len(self.assignment.layer) // layers
        return replace(self, assignment=Assignment(*(column[:rows] for column in self.assignment)))


def known_assignment(image: Tensor, query: Tensor, target: Tensor, layers: int) -> Assignment:
    """Queries with known targets, `(P,)` each, at every layer:
    each is the only candidate of its set.
    """
    count = len(image)
    layer = torch.arange(layers, device=image.device).repeat_interleave(
        count, output_size=layers * count
    )
    group = torch.arange(layers * count, device=image.device)
    return Assignment(
        layer, image.repeat(layers), query.repeat(layers), target.repeat(layers), group
    )


@dataclass(frozen=True)
class United:
    """The union of other matches of the same queries, at every layer: each query learns the target
    that most of them give it, the first of those that tie (GO-LSD in D-FINE's code)."""

    of: tuple[Match, ...]


Assign = Hungarian | Dynamic | Known | United


@dataclass(frozen=True)
class Match:
    """One block's matching problem: its outputs, and the targets that they are matched to."""

    output: DecoderOutput
    targets: Targets
    assign: Assign
    copies: int = 1  # equal parts of the block, each matched for itself
    sampling: Sampling | None = None  # of the step, where masks are learned

    @property
    def counts(self) -> list[list[int]]:
        """Positives of each layer and image, which the host knows before they are matched."""
        layers, _, copies, queries = self.shape
        if isinstance(self.assign, Known):
            assert self.assign.counts, "nobody has counted the positives"
            return [list(self.assign.counts)] * layers
        assert isinstance(self.assign, Hungarian)
        of, sizes = self.assign.candidates.of, self.targets.sizes
        several = [
            [of(i, layers, queries=queries, targets=size) * size for size in sizes]
            for i in range(layers)
        ]
        return [[copies * min(count, queries) for count in row] for row in several]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Layers, images, copies, queries of a copy."""
        layers, batch, queries, _ = self.output.logits.shape
        return layers, batch, self.copies, queries // self.copies


@torch.no_grad()
def assign(matches: Sequence[Match]) -> list[Assignment]:
    """Solve every block's matching with one copy to the host and one back."""
    # The costs of all blocks, in one copy to the host.
    with torch.autocast(matches[0].output.boxes.device.type, enabled=False):
        costs = [_costs(match) for match in matches]
    flat = torch.cat([part.flatten() for parts in costs for part in parts])
    ends = np.cumsum([sum(part.numel() for part in parts) for parts in costs])
    arrays = np.split(flat.cpu().numpy(), ends[:-1])
    # Each block solved there; the rows of all blocks, in one copy back.
    solved = [_solve(array, match) for array, match in zip(arrays, matches, strict=True)]
    places = {id(match): i for i, match in enumerate(matches)}
    for i, match in enumerate(matches):
        if isinstance(match.assign, United):
            solved[i] = _unite([solved[places[id(member)]] for member in match.assign.of], match)
    packed = torch.from_numpy(np.concatenate(solved, axis=1)).to(flat.device, non_blocking=True)
    parts = packed.split([rows.shape[1] for rows in solved], dim=1)
    return [
        match.assign.assignment if isinstance(match.assign, Known) else Assignment(*rows)
        for match, rows in zip(matches, parts, strict=True)
    ]


def _costs(match: Match) -> list[Tensor]:
    """Costs `(l, b, K, N / K, T)` of some layers and images at a time,
    in order, in float32 or better.

    One empty tensor where there is nothing to solve.
    """
    if not isinstance(match.assign, Hungarian | Dynamic) or not len(match.targets.labels):
        return [match.targets.boxes.new_zeros(0)]
    layers, batch, copies, queries = match.shape
    # Outputs and targets of every layer, image and copy, in the targets' precision.
    labels, boxes = _pad(match.targets)
    labels = labels[None, :, None].expand(layers, batch, copies, -1)
    boxes = boxes[None, :, None].expand(layers, batch, copies, -1, -1)
    logits, predicted = (
        t.detach().to(boxes.dtype).unflatten(2, (copies, queries)) for t in match.output[:2]
    )
    # As many layers, or else images, at a time as a CPU's cache holds.
    together = layers * batch
    if boxes.device.type == "cpu":
        together = max(CACHED // (copies * queries * labels.shape[-1]), 1)
    rows, columns = max(together // batch, 1), min(together, batch)
    costs = [
        match.assign.cost(
            *(t[i : i + rows, j : j + columns] for t in (logits, predicted, labels, boxes))
        )
        for i in range(0, layers, rows)
        for j in range(0, batch, columns)
    ]
    if (
        isinstance(match.assign, Hungarian)
        and match.assign.masks is not None
        and match.sampling is not None
    ):
        masks = match.assign.masks(match.output, match.targets, match.sampling, copies)
        return [torch.cat([cost.flatten() for cost in costs]).view_as(masks) + masks]
    return costs


def _pad(targets: Targets) -> tuple[Tensor, Tensor]:
    """Labels `(B, T)` and boxes `(B, T, 4)` of each image,
    filled up to the largest count with its last target.

    Not with zeros: a class term may look for the best overlap of an image. An image without targets
    gets any.
    """
    sizes, offsets = (
        np.array(n, dtype=np.int64)[:, None] for n in (targets.sizes, targets.offsets)
    )
    place = np.minimum(np.arange(sizes.max()), np.maximum(sizes - 1, 0))
    of_host = torch.from_numpy(np.minimum(offsets + place, len(targets.labels) - 1))
    rows = of_host.to(targets.labels.device, non_blocking=True)
    return targets.labels[rows], targets.boxes[rows]


def _solve(costs: NDArray[np.floating], match: Match) -> NDArray[np.int64]:
    """The rows of an `Assignment`, `(5, M)` in query order, by what `_costs` makes.

    Costs that are not finite are overwritten.
    """
    parts = [np.empty((5, 0), dtype=np.int64)]
    if not isinstance(match.assign, Hungarian | Dynamic) or not costs.size:
        return parts[0]
    layers, batch, copies, queries = match.shape
    finite = np.nan_to_num(costs, copy=False, nan=WORST, posinf=WORST, neginf=-WORST)
    finite = finite.reshape(layers, batch, copies, queries, -1)
    targets = match.targets
    for place, (layer, image, copy) in enumerate(np.ndindex(layers, batch, copies)):
        query, column = match.assign.solve(
            finite[layer, image, copy, :, : targets.sizes[image]], layer, layers
        )
        target = column + targets.offsets[image]
        rows = np.empty((5, len(query)), dtype=np.int64)
        rows[0], rows[1] = layer, image
        rows[2], rows[3] = query + copy * queries, target
        rows[4] = target + place * len(targets.labels)  # the candidate set
        parts.append(rows)
    return np.concatenate(parts, axis=1)


def _unite(solved: Sequence[NDArray[np.int64]], match: Match) -> NDArray[np.int64]:
    """The rows of an `Assignment`, `(5, M)`,
    for the union of such of `solved`, the same at every layer of `match`.
    """
    # Each pair of image, query and target once, in this order, and how many say so.
    pairs, votes = np.unique(np.concatenate(solved, axis=1)[1:4], axis=1, return_counts=True)
    # Of a query's pairs the first: most votes, then the lower target.
    pairs = pairs[:, np.lexsort((pairs[2], -votes, pairs[1], pairs[0]))]
    first = np.diff(pairs[:2], axis=1, prepend=-1).any(axis=0)
    image, query, target = pairs = pairs[:, first]
    # At every layer.
    layers, batch, copies, queries = match.shape
    layer = np.repeat(np.arange(layers), pairs.shape[1])
    place = (layer * batch + np.tile(image, layers)) * copies + np.tile(query // queries, layers)
    candidate_set = np.tile(target, layers) + place * len(match.targets.labels)
    return np.stack([layer, *np.tile(pairs, layers), candidate_set])
