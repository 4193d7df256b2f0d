"""Co-DETR's scheme: queries from positives, its switches, and what it is beside other schemes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detrellis.errors import UserError
from detrellis.matching import known_assignment
from detrellis.nn.neck import flatten
from detrellis.nn.position import SineMap
from detrellis.recipes.build import build
from detrellis.schemes.base import QueryBlock, Step
from detrellis.schemes.collaborative.assigners import IGNORED
from detrellis.schemes.collaborative.pyramid import Coarser, Pyramid
from detrellis.schemes.collaborative.queries import MIN_QUERIES, choose
from detrellis.schemes.collaborative.scene import BranchAssignment, random_draw
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.training import TrainableDetector
from detrellis.types import Targets

from ..small import CLASSES, images, small, targets, with_own_backbone

SIZES = torch.tensor([[64.0, 96.0], [64.0, 80.0]])


def make(
    *overrides: str, name: str = "tiny", schemes: Sequence[str] = ("none", "co=atss")
) -> TrainableDetector:
    return build(small(name, schemes).override(list(overrides)), CLASSES).eval()


def extended(
    model: TrainableDetector, truth: Targets
) -> tuple[Step, list[QueryBlock], dict[str, Tensor]]:
    model.reseed(0)
    step = model.begin(images(((64, 96), (64, 80))), truth)
    found = [s.extend(step) for s in model.training_schemes]
    return (
        step,
        [b for e in found for b in e.blocks],
        {k: v for e in found for k, v in e.losses.items()},
    )


def losses(model: TrainableDetector, truth: Targets) -> dict[str, float]:
    model.reseed(0)
    return {
        k: float(v.detach()) for k, v in model(images(((64, 96), (64, 80))), truth).losses.items()
    }


def found(owners: Sequence[Sequence[int]], cells: int = 1) -> BranchAssignment:
    """Anchors numbered by the first coordinate, features numbered by cell."""
    most = max(map(len, owners))
    owner = torch.tensor([[*own, *[IGNORED] * (most - len(own))] for own in owners])
    number = torch.arange(float(most))
    boxes = torch.stack([number, number, number + 2, number + 4], dim=1).expand(len(owners), -1, -1)
    features = torch.arange(float(most // cells))[:, None].expand(len(owners), -1, 32)
    return BranchAssignment(boxes, owner, features, boxes)


# The choice of queries


def test_positives_come_first_with_their_targets_and_features() -> None:
    owners = [[-1, 1, -2, 0, 1, -1] * 4, [-1, -1, 0, -2, -1, -1] * 4]
    chosen = choose(found(owners, cells=2), SIZES, (0, 2), random_draw(torch.Generator()))
    assert chosen.boxes.shape == (2, 12, 4)
    assert chosen.unused is None
    assert chosen.image.tolist() == [0] * 12 + [1] * 4
    assert chosen.target.tolist() == [1, 0, 1] * 4 + [2] * 4
    anchor = chosen.boxes[..., 0] * SIZES[:, 1:] - 1  # the left side of the box
    assert anchor[0].round().tolist() == [n for n in range(24) if owners[0][n] >= 0]
    assert torch.equal(chosen.features[..., 0], (anchor.round() / 2).floor())
    others = anchor[1, 4:].round().long().tolist()
    assert all(owners[1][n] == -1 for n in others)
    assert len(set(others)) == 8


@settings(max_examples=60, deadline=None)
@given(
    owners=st.lists(st.lists(st.integers(-2, 3), min_size=1, max_size=40), min_size=1, max_size=3),
    most=st.integers(9, 20),
    fill=st.booleans(),
)
def test_any_choice(owners: list[list[int]], most: int, fill: bool) -> None:
    draw = random_draw(torch.Generator().manual_seed(1))
    sizes, offsets = SIZES[:1].expand(len(owners), -1), range(0, 4 * len(owners), 4)
    chosen = choose(found(owners), sizes, offsets, draw, max_queries=most, fill=fill)
    positive = [sum(n >= 0 for n in own) for own in owners]
    slots = max(MIN_QUERIES, min(most, max(positive)))
    assert chosen.boxes.shape[1] == slots
    assert torch.bincount(chosen.image, minlength=len(owners)).tolist() == [
        min(n, slots) for n in positive
    ]
    filled = [
        min(slots, p + (own.count(-1) if fill else 0))
        for own, p in zip(owners, positive, strict=True)
    ]
    unused = [slots] * len(owners) if chosen.unused is None else (~chosen.unused).sum(1).tolist()
    assert unused == filled
    anchor = (chosen.boxes[..., 0] * SIZES[0, 1] - 1).round().long()
    for image, slot, target in zip(chosen.image, chosen.slot, chosen.target, strict=True):
        assert owners[image][anchor[image, slot]] + 4 * image == target
    known = known_assignment(chosen.image, chosen.slot, chosen.target, 3)
    assert known.layer.bincount(minlength=3).tolist() == [len(chosen.image)] * 3


def test_more_positives_than_queries_are_drawn_by_the_seed() -> None:
    many = found([[0] * 400])
    picks = [
        choose(many, SIZES[:1], (0,), random_draw(torch.Generator().manual_seed(seed))).boxes
        for seed in (0, 0, 1)
    ]
    assert picks[0].shape[1] == 300
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])


def test_draws_are_in_order_without_repetition_and_fair() -> None:
    draw = random_draw(torch.Generator().manual_seed(0))
    indices = np.arange(3, 40_003, 2)
    drawn = [draw(indices, 256) for _ in range(200)]
    assert all(
        len(d) == 256 and (np.diff(d) > 0).all() and np.isin(d, indices).all() for d in drawn
    )
    assert np.concatenate(drawn).mean() == pytest.approx(indices.mean(), rel=0.02)
    assert draw(indices[:5], 256).tolist() == indices[:5].tolist()


# The scheme


def test_every_query_learns_its_branchs_target() -> None:
    model = make()
    truth = targets((2, 3))
    _, (block,), terms = extended(model, truth)
    assert set(terms) == {"co_atss_head/class", "co_atss_head/giou", "co_atss_head/centerness"}
    known = block.supervision.assign.assignment  # type: ignore[union-attr]
    assert known.layer.bincount().tolist() == [len(known.layer) // 2] * 2
    assert block.normaliser == max(len(known.layer) // 2, 1)
    owner = truth.image[known.target]
    assert torch.equal(owner, known.image)
    # The boxes are anchors: squares of eight strides, in shares of each image's own size.
    assert block.queries.boxes is not None
    sides = block.queries.boxes[..., 2:] * SIZES.flip(-1)[:, None]
    torch.testing.assert_close(sides[..., 0], sides[..., 1])
    assert set(sides[..., 0].round().unique().tolist()) <= {64.0, 128.0, 256.0, 512.0}


def test_heads_alone_queries_alone_and_their_weights() -> None:
    truth = targets((2, 3))
    both, heads, queries, louder = (
        losses(make(*o), truth)
        for o in (
            (),
            ("schemes.co.query_weight=0",),
            ("schemes.co.head_weight=0",),
            ("schemes.co.head_weight=3", "schemes.co.query_weight=4"),
        )
    )
    assert not any(k.startswith("co_atss/") for k in heads)
    assert not any(k.startswith("co_atss_head/") for k in queries)
    assert {k for k in both if k.startswith("co_atss")} == {
        k for k in heads | queries if k.startswith("co_atss")
    }
    for key in both:
        if key.startswith("co_atss_head/"):
            assert louder[key] == pytest.approx(1.5 * both[key])
            assert heads[key] == pytest.approx(both[key])
        elif key.startswith("co_atss/"):
            assert louder[key] == pytest.approx(4 * both[key])
            assert queries[key] == pytest.approx(both[key], rel=1e-4)
        elif key.startswith("main/"):
            assert heads[key] == pytest.approx(both[key], rel=1e-4)


def test_a_heads_loss_counts_once_for_each_decoder_layer() -> None:
    model = make()
    step, _, terms = extended(model, targets((2, 3)))
    (scheme,) = model.training_schemes
    assert isinstance(scheme, Collaborative)
    plain, _ = scheme.branches[0](scheme.scene(step), random_draw(scheme.generator))
    assert float(terms["co_atss_head/class"].detach()) == pytest.approx(
        2 * 2 * float(plain["class"].detach())
    )


def test_a_branch_may_stand_twice() -> None:
    model = make(schemes=("none", "co=atss+atss+atss"))
    _, blocks, _ = extended(model, targets((2, 3)))
    assert [b.name for b in blocks] == ["co_atss", "co_atss2", "co_atss3"]
    assert not torch.equal(blocks[0].queries.content, blocks[1].queries.content)
    assert model.training_schemes[0].extra_queries == 900


def test_gradients_reach_the_memory_by_both_ways() -> None:
    for switch in ("schemes.co.query_weight=0", "schemes.co.head_weight=0"):
        model = make(switch, "schemes.co.features=true")
        step = model.begin(images(), targets((2, 3)))
        step = Step(
            **{
                **step.__dict__,
                "memory": step.memory._replace(tokens=step.memory.tokens.detach().requires_grad_()),
            }
        )
        (extension,) = (s.extend(step) for s in model.training_schemes)
        total = sum(extension.losses.values()) + sum(
            b.queries.content.square().sum() for b in extension.blocks
        )
        assert isinstance(total, Tensor)
        total.backward()
        assert step.memory.tokens.grad is not None
        assert step.memory.tokens.grad.abs().sum() > 0
    assert not any(
        b.queries.boxes.requires_grad for b in extension.blocks if b.queries.boxes is not None
    )


@pytest.mark.parametrize(
    ("name", "places"),
    [("tiny", 4), ("deformable_detr_r50", 2), ("conditional_detr_r50", 2), ("dab_detr_r50", 4)],
)
def test_queries_are_of_the_detectors_kind(name: str, places: int) -> None:
    model = make(name=name)
    step, (block,), _ = extended(model, targets((2, 3)))
    assert block.queries.boxes is not None
    assert block.queries.boxes.shape[-1] == places
    assert (block.queries.position is None) == (step.queries.position is None)


def test_a_vector_for_each_branch_instead_of_a_number() -> None:
    scalar, vector = (
        make(f"schemes.co.vector={v}", name="deformable_detr_r50") for v in (False, True)
    )
    shapes = [dict(m.named_parameters())["schemes.0.marks"].shape for m in (scalar, vector)]
    assert [tuple(s) for s in shapes] == [(1, 1), (1, 64)]


def test_unused_queries_are_read_by_nobody_and_learn_nothing() -> None:
    model = make("schemes.co.pad=mask")
    step, (block,), _ = extended(model, targets((1, 4)))
    assert block.unused is not None
    assert block.unused.any()
    used = ~block.unused
    assert used.any(1).all()
    changed = block.queries._replace(content=block.queries.content + 5 * block.unused.unsqueeze(-1))
    outputs = [
        model.detector.decode(step.memory, {block.segment: q})[block.name]
        for q in (block.queries, changed)
    ]
    torch.testing.assert_close(outputs[0].logits[:, used], outputs[1].logits[:, used])
    assert not torch.allclose(
        outputs[0].logits[:, block.unused], outputs[1].logits[:, block.unused]
    )
    rule, known = block.supervision.rule, block.supervision.assign.assignment  # type: ignore[union-attr]
    logits = outputs[0].logits.detach().requires_grad_()
    terms = rule(outputs[0]._replace(logits=logits), step.targets, known, torch.tensor(1.0))
    (slope,) = torch.autograd.grad(terms["class"].sum(), logits)
    assert (slope[:, block.unused] == 0).all()
    assert (slope[:, used] != 0).all()


def test_beside_align_its_labels_stay_unless_asked_for() -> None:
    truth = targets((2, 3))
    plain = losses(make("loss.classification=focal"), truth)  # what is left of it beside align
    beside = losses(make(schemes=("none", "co=atss", "align=2")), truth)
    aligned = losses(make("schemes.co.aligned=true", schemes=("none", "co=atss", "align=2")), truth)
    assert plain["co_atss/class/0"] == pytest.approx(beside["co_atss/class/0"])
    assert plain["main/class/0"] != pytest.approx(beside["main/class/0"])
    assert aligned["co_atss/class/0"] != pytest.approx(plain["co_atss/class/0"])
    # One candidate a target: rank 0
    assert aligned["co_atss/box/0"] == pytest.approx(plain["co_atss/box/0"])


def test_groups_do_not_multiply_its_queries() -> None:
    alone = extended(make(), targets((2, 3)))[1]
    grouped = extended(make(schemes=("none", "co=atss", "group=3")), targets((2, 3)))[1]
    ours = {b.name: b for b in grouped}["co_atss"]
    assert ours.copies == 1
    assert ours.queries.content.shape == alone[0].queries.content.shape


def test_positives_are_logged_for_each_target() -> None:
    model = make()
    model.reseed(0)
    metrics = model(images(((64, 96), (64, 80))), targets((2, 3))).metrics
    block = extended(model, targets((2, 3)))[1][0]
    known = block.supervision.assign.assignment  # type: ignore[union-attr]
    assert float(metrics["co_atss/positives"]) == pytest.approx(len(known.layer) / 2 / 5)
    assert model(images(), targets((0, 0))).metrics["co_atss/positives"].isnan()


def test_softmax_detectors_are_refused() -> None:
    with pytest.raises(
        UserError, match="scheme co cannot train detr-r50: its classes exclude each other"
    ):
        make(name="detr_r50")


# Levels


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_one_level_becomes_five(stride: int) -> None:
    memory = flatten(
        [torch.randn(2, 64, 128 // stride, 256 // stride)],
        None,
        SineMap(64, temperature=1e4, offset=0.0),
    )
    pyramid = Pyramid(64, stride)
    assert pyramid.strides == (8, 16, 32, 64, 128)
    assert [tuple(m.shape[-2:]) for m in pyramid(memory)] == [
        (128 // s, 256 // s) for s in pyramid.strides
    ]


def test_several_levels_get_a_coarser_one() -> None:
    maps = [torch.randn(2, 64, 13, 9), torch.randn(2, 64, 7, 5)]
    found = Coarser(64, (8, 16))(flatten(maps, None, SineMap(64, temperature=1e4, offset=0.0)))
    assert torch.equal(found[0], maps[0])
    assert torch.equal(found[1], maps[1])
    assert [tuple(m.shape[-2:]) for m in found] == [(13, 9), (7, 5), (4, 3)]


def test_strides_of_the_levels() -> None:
    names = ("dino_r50", "dino_r50_5scale", "dab_detr_r50_dc5")
    strides = {name: with_own_backbone(name).detector.level_strides for name in names}
    assert strides == {
        "dino_r50": (8, 16, 32, 64),
        "dino_r50_5scale": (4, 8, 16, 32, 64),
        "dab_detr_r50_dc5": (16,),
    }
