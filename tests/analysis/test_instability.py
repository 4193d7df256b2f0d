"""V and IS on cases made by hand, and against the matching of one image at a time."""

from __future__ import annotations

import pytest
import torch

from detrellis.analysis.instability import changed, instability, matched_boxes
from detrellis.analysis.outputs import one_to_one
from detrellis.matching import Candidates, Hungarian
from detrellis.supervision import Supervision
from detrellis.types import Assignment, DecoderOutput

from ..small import CLASSES, targets


def test_changed_entries_are_counted_between_neighbours() -> None:
    v = torch.tensor([[0, -1, 1, -1], [-1, 0, 1, -1], [-1, 0, 1, -1], [0, 1, -1, -1]])
    assert changed(v).tolist() == [2, 0, 3]  # a box that moves to another query counts for both
    assert changed(v[:1]).tolist() == []
    other = torch.tensor([[-1], [-1], [0], [0]])
    assert instability([v, other]).tolist() == [1.0, 0.5, 1.5]
    assert torch.equal(changed(torch.stack([v, v], 1)), torch.stack([changed(v)] * 2, 1))


@pytest.mark.parametrize("sizes", [(2, 3), (0, 4), (9, 1), (0, 0)])
def test_v_is_the_matching_of_each_image(sizes: tuple[int, ...]) -> None:
    """Also with more boxes than queries, and whatever the run trained with."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 6, CLASSES, generator=generator)
    boxes = torch.rand(3, 2, 6, 4, generator=generator) * 0.4 + 0.2
    output, there = DecoderOutput(logits, boxes, boxes), targets(sizes)
    supervision = Supervision(Hungarian(candidates=Candidates(3, 3, 3)))
    v = matched_boxes(one_to_one(supervision, output, there), there, 3, 6)
    assert v.shape == (3, 2, 6)
    cost = Hungarian().cost
    for image, first in enumerate(there.offsets):
        own = slice(first, first + sizes[image])
        for layer in range(3):
            found = {int(q): int(v[layer, image, q]) for q in range(6) if v[layer, image, q] >= 0}
            assert len(set(found.values())) == len(found) == min(sizes[image], 6)
            if not found:
                continue
            costs = cost(logits[layer, image], boxes[layer, image], there.labels[own], there.boxes[own])
            total = sum(costs[q, j] for q, j in found.items())
            for a in found:  # no swap of two queries is cheaper
                for b in found:
                    swapped = total - costs[a, found[a]] - costs[b, found[b]] + costs[a, found[b]] + costs[b, found[a]]
                    assert a == b or swapped >= total - 1e-5


def test_no_positive_is_no_box() -> None:
    empty = Assignment(*torch.zeros(5, 0, dtype=torch.int64))
    assert matched_boxes(empty, targets((1, 0)), 2, 3).tolist() == [[[-1] * 3] * 2] * 2
