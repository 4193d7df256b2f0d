"""Hybrid matching: where the second block comes from, and what its loss is divided by."""

from __future__ import annotations

import pytest
import torch

from detrellis.errors import UserError
from detrellis.matching import Hungarian
from detrellis.recipes.build import build
from detrellis.schemes.base import QueryBlock, Step
from detrellis.training import TrainableDetector
from detrellis.types import Targets

from ..small import CLASSES, NETWORKS, images, small, targets


def step_of(model: TrainableDetector, truth: Targets) -> Step:
    return model.begin(images(), truth)


def second(
    name: str, *overrides: str, truth: Targets | None = None
) -> tuple[TrainableDetector, Step, QueryBlock]:
    model = build(small(name, ["none", "hybrid=2"]).override(list(overrides)), CLASSES).eval()
    step = step_of(model, targets((2, 3)) if truth is None else truth)
    (block,) = model.training_schemes[0].extend(step).blocks
    return model, step, block


@pytest.mark.parametrize("name", NETWORKS)
def test_the_second_block_is_of_the_same_kind(name: str) -> None:
    _, step, block = second(name)
    for ours, main in zip(block.queries, step.queries, strict=True):
        assert (ours is None) == (main is None)
        if ours is not None and main is not None:
            assert ours.shape[1] == 15
            assert ours.shape[2:] == main.shape[2:]
    assert block.sees == ()
    assert block.normaliser == 10


def test_proposals_are_those_ranked_after_the_main_ones() -> None:
    _, step, block = second("deformable_detr_r50_two_stage_plus")
    assert step.proposals is not None
    order = step.proposals.scores.argsort(descending=True)[:, :27]
    assert torch.equal(order[:, :12], step.proposals.best)
    assert step.detector.queries.head is not None
    every = step.detector.queries.head.boxes(step.proposals)
    chosen = every.gather(1, order[:, 12:, None].expand(-1, -1, 4))
    torch.testing.assert_close(block.queries.boxes, chosen)


def test_too_few_tokens_for_a_second_block() -> None:
    model = build(
        small("tiny", ["none", "hybrid"]).override("detector.queries.count=500"), CLASSES
    ).eval()
    assert model.training_schemes[0].extend(step_of(model, targets((2, 3)))).blocks == []


def test_divisor_weight_and_k() -> None:
    settings = ("schemes.hybrid.k=4", "schemes.hybrid.weight=0.5", "schemes.hybrid.divisor=boxes")
    _, _, block = second("tiny", *settings)
    assert block.normaliser == 5
    assert block.weight == 0.5
    assert isinstance(block.supervision.assign, Hungarian)
    assert block.supervision.assign.candidates.of(2, 3, queries=8, targets=7) == 4  # no cap
    _, _, empty = second("tiny", truth=targets((0, 0)))
    assert empty.normaliser == 1


def test_the_default_size_follows_the_detector() -> None:
    for own, extra in ((12, 60), (900, 1500)):
        settings = ["schemes.hybrid.queries=null", f"detector.queries.count={own}"]
        model = build(small("tiny", ["none", "hybrid"]).override(settings), CLASSES)
        assert model.training_schemes[0].extra_queries == extra


def test_patterns_multiply_the_second_block_too() -> None:
    _, step, block = second("dab_detr_r50", "detector.queries.patterns=3")
    assert step.queries.content.shape[1] == 36
    assert block.queries.content.shape[1] == 45


def test_aligned_branches_rank_in_the_second_only() -> None:
    model = build(small("align_h_deformable_detr_r50"), CLASSES)
    output = model(images(), targets((2, 1)))
    assert {k.split("/")[0] for k in output.losses} == {"main", "hybrid", "proposals", "schemes"}
    assert isinstance(model.supervision.assign, Hungarian)
    assert model.supervision.assign.candidates.intermediate == 1


@pytest.mark.parametrize(
    ("name", "schemes", "overrides", "words"),
    [
        ("tiny", ["align,stable"], [], "both set the classification target"),
        ("tiny", ["align,rank"], [], "leave scheme rank out"),
        ("tiny", ["rank"], ["loss.classification=qfl"], "leave scheme rank out"),
        (
            "tiny",
            ["stable,rank"],
            ["schemes.stable.supervised=false"],
            "both set the matching cost",
        ),
        ("tiny", ["align"], ["loss.classification=qfl"], "both set the classification target"),
        ("tiny", ["stable"], ["loss.classification=vfl"], "schemes.stable.supervised=false"),
        ("detr_r50", ["align"], [], "softmax"),
        ("detr_r50", ["stable"], [], "softmax"),
        ("detr_r50", [], ["loss.classification=psl"], "softmax"),
        ("detr_r50", [], ["detector.iou_branch=root"], "iou_branch=root"),
    ],
)
def test_contradictions_are_refused(
    name: str, schemes: list[str], overrides: list[str], words: str
) -> None:
    with pytest.raises(UserError) as error:
        build(small(name, schemes).override(overrides), CLASSES)
    assert words in f"{error.value.message} {error.value.remedy}"


def test_what_goes_together_is_built() -> None:
    for schemes, overrides in (
        (["align,stable"], ["schemes.stable.supervised=false"]),
        (["align"], ["loss.classification=qfl", "schemes.align.classification=base"]),
        (["stable"], ["loss.classification=psl", "schemes.stable.modulated=false"]),
        (["align,rank"], ["schemes.align.classification=base"]),
    ):
        model = build(small("tiny", schemes).override(overrides), CLASSES)
        assert all(v.isfinite() for v in model(images(), targets((2, 0))).losses.values())


def test_a_scheme_without_a_number() -> None:
    with pytest.raises(UserError, match="takes no number"):
        small("tiny", ["stable=3"])
