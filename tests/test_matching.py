"""Hungarian matching: against scipy on the plain cost,
for layers, copies, empty images, bad numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, pairwise_giou
from detrellis.matching import Hungarian, Known, Match, MatchingCost, United, assign
from detrellis.types import Assignment, DecoderOutput, Targets

CLASSES = 6


def problem(
    layers: int, sizes: tuple[int, ...], queries: int, seed: int = 0
) -> tuple[DecoderOutput, Targets]:
    g = torch.Generator().manual_seed(seed)
    batch, total = len(sizes), sum(sizes)
    logits = torch.randn(layers, batch, queries, CLASSES, generator=g) * 3
    boxes = torch.rand(layers, batch, queries, 4, generator=g) * 0.5 + 0.1
    labels = torch.randint(CLASSES, (total,), generator=g)
    return DecoderOutput(logits, boxes, boxes), Targets(
        labels, torch.rand(total, 4, generator=g) * 0.5 + 0.1, sizes
    )


def full_cost(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The cost as the papers write it, over all classes: `(N, T)`."""
    p = logits.sigmoid()
    present = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    absent = 0.75 * p**2 * -(1 - p + 1e-8).log()
    overlap = pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
    return 2 * (present - absent)[:, labels] + 5 * torch.cdist(boxes, targets, p=1) - 2 * overlap


def rows(found: Assignment) -> set[tuple[int, ...]]:
    return set(zip(*(t.tolist() for t in found[:4]), strict=True))


@given(
    layers=st.integers(1, 3),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple),
    copies=st.integers(1, 3),
    each=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_is_optimal_for_every_layer_image_and_copy(
    layers: int, sizes: tuple[int, ...], copies: int, each: int, seed: int
) -> None:
    output, targets = problem(layers, sizes, copies * each, seed)
    expected = set()
    for layer, image, copy in np.ndindex(layers, len(sizes), copies):
        own = slice(copy * each, (copy + 1) * each)
        first = targets.offsets[image]
        gt = slice(first, first + sizes[image])
        cost = full_cost(
            output.logits[layer, image, own],
            output.boxes[layer, image, own],
            targets.labels[gt],
            targets.boxes[gt],
        )
        for q, t in zip(*linear_sum_assignment(cost.numpy()), strict=True):
            expected.add((layer, image, int(q) + copy * each, int(t) + first))
    assert rows(assign([Match(output, targets, Hungarian(), copies)])[0]) == expected


def test_several_blocks_share_one_copy_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: calls.append(self.numel()) or cpu(self))
    output, targets = problem(2, (3, 0, 2), 8)
    smaller, _ = problem(2, (3, 0, 2), 5, seed=1)
    known = Known(Assignment(*torch.zeros(5, 1, dtype=torch.int64)))
    matches = [
        Match(output, targets, Hungarian()),
        Match(smaller, targets, known),
        Match(smaller, targets, Hungarian()),
    ]
    found = assign(matches)
    assert len(calls) == 1
    assert found[1] is known.assignment
    assert rows(found[0]) == rows(assign([matches[0]])[0])
    assert rows(found[2]) == rows(assign([matches[2]])[0])


def test_no_targets() -> None:
    output, targets = problem(2, (0, 0), 4)
    assert all(len(t) == 0 for t in assign([Match(output, targets, Hungarian())])[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_are_matched_last(bad: float) -> None:
    output, targets = problem(1, (3,), 6)
    output.logits[0, 0, 2] = bad
    output.boxes[0, 0, 4] = bad
    found = assign([Match(output, targets, Hungarian())])[0]
    assert len(found.query) == 3
    assert 4 not in found.query.tolist()


@given(st.integers(0, 50), st.permutations(range(7)))
@settings(max_examples=30, deadline=None)
def test_permuting_queries_permutes_the_assignment(seed: int, order: list[int]) -> None:
    output, targets = problem(1, (2, 3), 7, seed)
    turned = output.map(lambda t: t[:, :, order])
    plain = {
        (image, query, target)
        for _, image, query, target in rows(assign([Match(output, targets, Hungarian())])[0])
    }
    other = rows(assign([Match(turned, targets, Hungarian())])[0])
    assert {(image, order[query], target) for _, image, query, target in other} == plain


def test_cost_of_many_classes_is_not_computed() -> None:
    """The targets' class columns are gathered before the sigmoid."""
    output, targets = problem(1, (2,), 4)
    seen = []

    def term(logits: Tensor, labels: Tensor, overlap: Tensor) -> Tensor:
        seen.append((logits.shape, labels.shape))
        return logits.new_zeros(*logits.shape[:-1], labels.shape[-1])

    assign([Match(output, targets, Hungarian(MatchingCost(class_term=term)))])
    assert seen == [((1, 1, 1, 4, CLASSES), (1, 1, 1, 2))]


@pytest.mark.parametrize("cached", [1, 200, 500])
def test_costs_computed_in_pieces_are_the_same(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image by image, several images, and several layers at a time."""
    output, targets = problem(layers=3, sizes=(4, 0, 7), queries=12)
    match = [Match(output, targets, Hungarian(), copies=2)]
    whole = assign(match)[0]
    monkeypatch.setattr("detrellis.matching.CACHED", cached)
    for one, other in zip(assign(match)[0], whole, strict=True):
        assert torch.equal(one, other)


def test_union_gives_each_query_its_most_frequent_target() -> None:
    """Over the layers of all matches;
    the lower target where two tie, and the same at every layer of a match.
    """
    (output, targets), (other, _) = problem(3, (3, 2, 0), 6), problem(1, (3, 2, 0), 6, seed=1)
    members = tuple(Match(o, targets, Hungarian(union=True), copies=2) for o in (output, other))
    *own, found = assign([*members, Match(output, targets, United(members), copies=2)])
    votes: dict[tuple[int, int], list[int]] = {}
    for _, image, query, target in (row for a in own for row in rows(a)):
        votes.setdefault((image, query), []).append(target)
    best = {
        key: min(set(said), key=lambda t, said=said: (-said.count(t), t))
        for key, said in votes.items()
    }
    assert any(len(set(said)) > 1 for said in votes.values())
    assert rows(found) == {
        (layer, *key, target) for key, target in best.items() for layer in range(3)
    }
    sets = {(layer, query // 3, target) for layer, _, query, target in rows(found)}
    assert len(found.candidate_set.unique()) == len(sets)


def test_union_of_nothing_is_empty() -> None:
    output, targets = problem(2, (0, 0), 4)
    member = Match(output, targets, Hungarian(union=True))
    assert not rows(assign([member, Match(output, targets, United((member,)))])[1])
