"""One-to-many pairs by the dynamic rule, and what MS-DETR and DAC-DETR make of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from detrellis.errors import UserError
from detrellis.matching import Dynamic, Match, assign
from detrellis.recipes.build import build
from detrellis.set_loss import SetLoss
from detrellis.supervision import Supervision
from detrellis.types import Assignment, DecoderOutput, Segment

from ..small import CLASSES, images, small, targets


def outputs(layers: int = 2, queries: int = 40) -> DecoderOutput:
    g = torch.Generator().manual_seed(0)
    boxes = torch.rand(layers, 2, queries, 4, generator=g) * 0.4 + 0.2
    logits = torch.randn(layers, 2, queries, CLASSES, generator=g)
    return DecoderOutput(logits, boxes, boxes)


def test_every_target_with_a_positive_gets_its_best_queries() -> None:
    output, truth = outputs(), targets((3, 4))
    found = assign(
        [Match(output, truth, Dynamic(np.arange, k=3, threshold=0.5, positive_fraction=1.0))]
    )[0]
    for layer in range(2):
        for image in range(2):
            mine = (found.layer == layer) & (found.image == image)
            owned = range(truth.offsets[image], truth.offsets[image] + truth.sizes[image])
            labels = truth.labels[owned.start : owned.stop]
            boxes = truth.boxes[owned.start : owned.stop]
            scores = -Dynamic(np.arange).cost(
                output.logits[layer, image], output.boxes[layer, image], labels, boxes
            )
            best = scores.argmax(1)
            positive = scores.amax(1) >= 0.5
            positive[scores.argmax(0)] = True
            for column, target in enumerate(owned):
                count = min(int((positive & (best == column)).sum()), 3)
                expected = scores[:, column].topk(count).indices.sort().values
                assert found.query[mine & (found.target == target)].tolist() == expected.tolist()


def test_positives_are_a_drawn_part_of_the_queries_at_most() -> None:
    costs = -np.ones((40, 2)) * [0.9, 0.1] - np.arange(40)[:, None] * 1e-4
    rule = Dynamic(lambda n: np.arange(n)[::-1], k=100, positive_fraction=0.25)
    query, column = rule.solve(costs, 0, 1)
    assert (len(query), set(column.tolist())) == (10, {0})
    drawn: list[int] = []
    replace(rule, draw=lambda n: (drawn.append(n), np.arange(n))[1]).solve(costs, 0, 1)
    assert drawn == [40]  # all that are positives, and no draw where they are few enough
    replace(rule, draw=lambda n: (drawn.append(n), np.arange(n))[1], positive_fraction=1.0).solve(
        costs, 0, 1
    )
    assert drawn == [40]
    assert [len(rows) for rows in rule.solve(np.zeros((40, 0)), 0, 1)] == [0, 0]


def test_a_query_of_two_targets_learns_the_class_of_the_better_alone() -> None:
    """Both boxes count. The other class is a negative like any other."""
    truth = targets((2,))._replace(labels=torch.tensor([1, 3]))
    output = outputs(1, 6).map(lambda t: t[:, :1])
    both = (
        torch.tensor([0, 0]),
        torch.tensor([0, 0]),
        torch.tensor([4, 4]),
        torch.tensor([0, 1]),
        torch.tensor([0, 1]),
    )
    rows = Assignment(*both)
    one = SetLoss(once=True)(output, truth, rows, torch.ones(()))
    last = SetLoss()(output, truth, Assignment(*(column[1:] for column in both)), torch.ones(()))
    first = SetLoss()(output, truth, Assignment(*(column[:1] for column in both)), torch.ones(()))
    torch.testing.assert_close(one["class"], last["class"])
    assert not torch.isclose(one["class"], first["class"]).any()
    torch.testing.assert_close(one["box"], last["box"] + first["box"])


@torch.no_grad()
def test_queries_of_the_second_stream_do_not_read_each_other() -> None:
    model = build(small("tiny", ["none", "dac"]), CLASSES, seed=0).eval()
    step = model.begin(images(), targets((2, 3)))
    count = step.queries.content.shape[1]

    def decoded(attends: bool, content: Tensor) -> Tensor:
        segment = Segment("dac", count, attends=attends)
        return model.detector.decode(
            step.memory, {segment: step.queries._replace(content=content)}
        )["dac"].logits[-1]

    other = step.queries.content.clone()
    other[:, 0] += 1
    changed = [
        (decoded(a, other) - decoded(a, step.queries.content)).abs().amax(-1) > 0
        for a in (False, True)
    ]
    assert changed[0].tolist() == [[True] + [False] * (count - 1)] * 2
    assert changed[1].all()


def test_one_to_many_losses_are_the_base_s_with_other_pairs() -> None:
    for name, scheme in (("tiny", "dac"), ("ms_deformable_detr_r50", "ms")):
        model = build(small(name, ["none", scheme]), CLASSES, seed=0).eval()
        losses = {k: v.item() for k, v in model(images(), targets((2, 3))).losses.items()}
        assert {k.split("/")[0] for k in losses} >= {"main", scheme}
        model.reseed(0)
        again = {k: v.item() for k, v in model(images(), targets((2, 3))).losses.items()}
        model.reseed(0)
        assert again == {k: v.item() for k, v in model(images(), targets((2, 3))).losses.items()}


def test_ms_learns_what_queries_read_before_they_are_told_apart() -> None:
    """With blocks that change nothing and targets' classes once,
    its output is the heads' of that stream.
    """
    model = build(small("ms_deformable_detr_r50"), CLASSES, seed=0).eval()
    decoder = model.detector.decoder
    with torch.no_grad():
        step = model.begin(images(), targets((2, 3)))
        output = model.detector.decode(step.memory, {Segment("main", 12): step.queries})["main"]
        assert output.between is not None
        said = decoder.say(list(output.between.states), output.between.references)  # type: ignore[operator]
        read = decoder.layers[0].read(
            step.queries.content,
            decoder.position(
                0, step.queries.content, step.queries, step.queries.boxes, step.memory
            ),
            step.memory,
        )
        torch.testing.assert_close(said.logits[0], decoder.heads.logits(0, read))
        assert step.queries.boxes is not None
        assert output.between.references is not None
        torch.testing.assert_close(output.between.references[0], step.queries.boxes)
        torch.testing.assert_close(output.between.references[1], output.boxes[0], atol=1e-5, rtol=0)


def test_what_cannot_carry_them_is_refused() -> None:
    for name, scheme, reason in (
        ("tiny", "ms", "self-attention first"),
        ("detr_r50", "dac", "softmax"),
        ("mask2former_r50", "dac", "masks"),
    ):
        with pytest.raises(UserError, match=reason):
            build(small(name, ["none", scheme]), CLASSES)
    assert isinstance(Supervision().rule, SetLoss)
