"""Masks of box detectors: what they change, what they cost, and what leaves them alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from detrellis.errors import UserError
from detrellis.mask_points import MaskCost, Points, Sampling, Seeded, mask_terms
from detrellis.matching import Hungarian, known_assignment
from detrellis.recipes import Recipe
from detrellis.recipes.build import build, build_supervision
from detrellis.recipes.network import build_detector
from detrellis.recipes.refuse import refuse
from detrellis.schemes.align import Align
from detrellis.schemes.config import AlignConfig
from detrellis.set_loss import SetLoss
from detrellis.supervision import match, supervise
from detrellis.types import Assignment, DecoderOutput, ImageBatch, Targets

from .small import CLASSES, images, small, targets, with_bitmaps
from .test_mask_points import problem

SIZES = torch.tensor([[64, 96], [128, 192]])


def masked(name: str, *override: str) -> Recipe:
    return small(name).override(["detector.masks={width: 32}", "loss.points=64", *override])


@pytest.mark.parametrize("name", ["tiny", "deformable_detr_r50", "rtdetr_r18"])
@torch.no_grad()
def test_masks_leave_the_boxes_of_equal_weights_bit_for_bit(name: str) -> None:
    boxes = build_detector(small(name).detector, CLASSES).eval()
    both = build_detector(masked(name).detector, CLASSES)
    found = both.load_state_dict(boxes.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert {key.split(".")[0] for key in found.missing_keys} <= {"masks", "decoder", "queries"}
    one, other = boxes(images()), both.eval()(images())
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.boxes, other.boxes)
    assert one.mask_embeds is None
    assert other.mask_embeds is not None


@torch.no_grad()
def test_scores_count_the_masks_unless_they_are_told_not_to() -> None:
    plain, ranked = (
        masked("tiny", f"detector.masks.scores={value}").detector for value in ("false", "true")
    )
    detector = build_detector(ranked, CLASSES).eval()
    other = build_detector(plain, CLASSES).eval()
    other.load_state_dict(detector.state_dict())
    with_masks, by_class = detector.detect(images(), SIZES), other.detect(images(), SIZES)
    assert all(len(d.masks or ()) == len(d.scores) for d in with_masks)
    assert all(
        (a.scores.max() < b.scores.max()).item() for a, b in zip(with_masks, by_class, strict=True)
    )
    boxes = replace(other.postprocess, mask_scores=True)(other(images()), SIZES)
    assert torch.equal(boxes[0].scores, with_masks[0].scores)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("detr_r50", "finest has stride 32"),
        ("dino_r50_5scale", "finest has stride 4"),
        ("lwdetr_tiny", "backbone.kind=window_vit"),
    ],
)
def test_detectors_without_a_map_of_stride_8_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        refuse(masked(name))


def test_matching_may_leave_masks_out() -> None:
    costs = (masked("tiny"), masked("tiny", "loss.cost_mask=0", "loss.cost_dice=0"), small("tiny"))
    matching = [build_supervision(recipe).assign for recipe in costs]
    assert [rule.masks for rule in matching if isinstance(rule, Hungarian)] == [
        MaskCost(),
        None,
        None,
    ]


def boxed(sizes: tuple[int, ...] = (2, 3)) -> tuple[DecoderOutput, Targets]:
    """A problem of boxes and masks."""
    output, truth = problem(sizes)
    generator = torch.Generator().manual_seed(1)
    boxes = (
        torch.rand(*output.logits.shape[:3], 4, generator=generator, dtype=torch.float64) * 0.4
        + 0.3
    )
    return output._replace(boxes=boxes), truth


def test_positives_in_any_order_lose_the_same() -> None:
    """Denoising's stand group by group, not image by image."""
    output, truth = boxed()
    image, query, target = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    ordered = known_assignment(image, query, target, len(output.logits))
    mixed = Assignment(
        *(column[torch.tensor([9, 2, 0, 5, 7, 1, 3, 8, 4, 6])] for column in ordered)
    )
    one = torch.tensor(1.0, dtype=torch.float64)
    terms = [
        mask_terms(output, truth, rows, one, Sampling(Seeded(), Points(40)), [[2, 3]] * 2)
        for rows in (ordered, mixed)
    ]
    assert all(torch.equal(terms[0][name], terms[1][name]) for name in ("mask", "dice"))
    assert terms[0]["mask"].min() > 0


def test_align_weighs_masks_as_it_weighs_boxes() -> None:
    output, truth = boxed((1, 1))
    base = build_supervision(masked("tiny"))
    aligned = Align(AlignConfig(k=2)).supervision(base)
    assert isinstance(aligned.rule, SetLoss)
    sampling, one = Sampling(Seeded(), Points(40)), torch.tensor(1.0, dtype=torch.float64)
    task = aligned.task("main", output, truth, one, sampling=sampling)
    (positives,) = match([task])
    losses, _ = supervise([task], [positives])
    weight = aligned.rule.pair_weight(output, truth, positives)
    assert weight is not None
    assert 0 < weight.min() < weight.max() == 1
    each = [
        mask_terms(
            output,
            truth,
            positives,
            one,
            sampling,
            task.match.counts,
            torch.eye(len(weight))[i].double(),
        )
        for i in range(len(weight))
    ]
    for name in ("mask", "dice"):
        total = sum(w * terms[name] for w, terms in zip(weight, each, strict=True))
        found = torch.stack([losses[f"main/{name}/{layer}"] for layer in range(2)])
        torch.testing.assert_close(found, 5 * total)


def masks_learned(*schemes: str, override: tuple[str, ...] = ()) -> set[str]:
    """The blocks of a step whose losses are of masks."""
    recipe = masked("tiny", *override).with_schemes(schemes)
    recipe = recipe.override("schemes.hybrid.queries=15") if recipe.schemes.hybrid else recipe
    model, batch = build(recipe, CLASSES), images()
    model.reseed(0)
    losses = model(batch, with_bitmaps(targets((3, 2)), batch)).losses
    return {name.split("/")[0] for name in losses if "/mask/" in name}


def test_blocks_that_learn_masks() -> None:
    ours = {"main", "proposals", "cdn"}
    assert masks_learned("group=2") == ours | {"group", "group_proposals"}
    assert masks_learned("hybrid=2") == ours | {"hybrid"}
    assert masks_learned("co=atss") == ours
    assert masks_learned("co=atss", override=("schemes.co={masks: true}",)) == ours | {"co_atss"}


def test_images_of_other_sizes_and_no_targets() -> None:
    model = build(masked("tiny"), CLASSES)
    batch: ImageBatch = images(((64, 96), (48, 80)))
    model.reseed(0)
    losses = model(batch, with_bitmaps(targets((0, 0)), batch)).losses
    assert losses["main/mask/0"] == 0
    assert losses["main/mask/0"].requires_grad
