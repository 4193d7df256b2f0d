"""DDQ-DETR's dense queries: what they learn, and by which heads."""

from __future__ import annotations

import pytest
import torch

from detrellis.boxes import cxcywh_to_xyxy, iou
from detrellis.errors import UserError
from detrellis.matching import Hungarian
from detrellis.pairs import pair_up
from detrellis.recipes.build import build
from detrellis.schemes.base import QueryBlock, Step
from detrellis.schemes.dense import Dense, task_aligned_target
from detrellis.schemes.ranks import highest
from detrellis.supervision import match, supervise
from detrellis.training import TrainableDetector

from ..small import CLASSES, images, small, targets


def dense(
    name: str = "ddq_dino_r50", *overrides: str
) -> tuple[TrainableDetector, Dense, Step, QueryBlock]:
    model = build(small(name, ["none", "dense"]).override(list(overrides)), CLASSES).eval()
    (scheme,) = model.training_schemes
    assert isinstance(scheme, Dense)
    step = model.begin(images(), targets((2, 3)))
    (block,) = scheme.extend(step).blocks
    return model, scheme, step, block


def test_the_best_tokens_however_they_overlap() -> None:
    model, scheme, step, _ = dense()
    assert scheme.head is not None
    with torch.no_grad():
        # Its boxes are as large as the image
        scheme.head.move.get_parameter("layers.2.bias")[2:] = 4.0
    proposals = scheme.head(step.memory)
    # Half as many again as 12
    assert torch.equal(proposals.best, proposals.scores.topk(18, dim=1).indices)
    (block,) = scheme.extend(step).blocks
    assert torch.equal(block.queries.boxes, proposals.boxes)  # type: ignore[arg-type]
    project = model.detector.queries.get_submodule("project")
    assert torch.equal(
        block.queries.content[1, 3], project(step.memory.tokens)[1, proposals.best[1, 3]]
    )
    assert block.proposals is not None
    assert block.sees == ()


def test_own_heads_answer_and_refine_and_the_detectors_learn_nothing_of_it() -> None:
    model, scheme, step, block = dense()
    main = model.main(step)
    before = model.detector.decode(
        step.memory, {main.segment: main.queries, block.segment: block.queries}
    )
    with torch.no_grad():
        for p in scheme.heads.parameters():
            p.add_(0.1)
    after = model.detector.decode(
        step.memory, {main.segment: main.queries, block.segment: block.queries}
    )
    assert torch.equal(before["main"].logits, after["main"].logits)
    assert torch.equal(before["main"].boxes, after["main"].boxes)
    assert not torch.isclose(before["dense"].logits, after["dense"].logits).any()
    # The second layer read other boxes
    assert not torch.equal(before["dense"].states[1], after["dense"].states[1])

    losses = model(images(), targets((2, 3))).losses
    torch.stack([v for k, v in losses.items() if k.startswith("dense/")]).sum().backward()
    assert all(
        p.grad is None or not p.grad.any() for p in model.detector.decoder.heads.parameters()
    )
    assert all(p.grad is not None for p in scheme.heads.parameters())


def test_k_queries_learn_each_target_in_every_layer() -> None:
    *_, block = dense("ddq_dino_r50", "schemes.dense.k=3", "schemes.dense.queries=14")
    assert block.queries.content.shape[1] == 14
    assign = block.supervision.assign
    assert isinstance(assign, Hungarian)
    for layer in (0, 1):
        assert assign.candidates.of(layer, 2, queries=14, targets=2) == 3
        # As many as there are queries for
        assert assign.candidates.of(layer, 2, queries=14, targets=7) == 2
    assert block.supervision.weights["box"] == 0


@torch.no_grad()
def test_targets_are_task_aligned() -> None:
    """Against a loop over targets."""
    model, _, step, block = dense()
    output = model.detector.decode(step.memory, {block.segment: block.queries})["dense"]
    task = block.supervision.task("dense", output, step.targets, step.mean_boxes)
    (positives,) = match([task])
    found = task_aligned_target(pair_up(output, step.targets, positives))
    rows = list(zip(*(t.tolist() for t in positives[:4]), strict=True))
    assert len(rows) == 2 * 5 * 4
    aligned, overlap = [], []
    for layer, image, query, target in rows:
        corners = (
            cxcywh_to_xyxy(b)
            for b in (output.boxes[layer, image, query], step.targets.boxes[target])
        )
        overlap.append(float(iou(*corners)))
        aligned.append(
            float(output.logits[layer, image, query, step.targets.labels[target]].sigmoid())
            * overlap[-1] ** 6
        )
    for i, (layer, _, _, target) in enumerate(rows):
        same = [j for j, other in enumerate(rows) if (other[0], other[3]) == (layer, target)]
        expected = (
            aligned[i] / (max(aligned[j] for j in same) + 1e-7) * max(overlap[j] for j in same)
        )
        assert float(found.target[i]) == pytest.approx(expected, abs=1e-6)
    assert found.box_weight is not None
    losses, _ = supervise([task], [positives])
    assert all(v.isfinite() for v in losses.values())
    assert losses["dense/box/0"] == 0


def test_highest_of_each_group() -> None:
    score, group = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), torch.tensor([7, 2, 7, 2, 9])
    assert highest(score, group).tolist() == [3, 5, 3, 5, 4]
    assert highest(score[:0], group[:0]).shape == (0,)


def test_heads_start_from_trained_weights() -> None:
    model, scheme, _, _ = dense()
    with torch.no_grad():
        for p in model.detector.parameters():
            p.add_(0.5)
    scheme.start_from(model.detector)
    for one, other in zip(
        scheme.heads.parameters(), model.detector.decoder.heads.parameters(), strict=True
    ):
        assert torch.equal(one, other)
        assert one is not other


def test_detectors_without_proposals_are_refused() -> None:
    with pytest.raises(UserError, match="its encoder proposes no boxes"):
        build(small("dab_detr_r50", ["dense"]), CLASSES)
