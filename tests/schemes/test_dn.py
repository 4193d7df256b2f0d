"""DN-DETR's denoising: what is disturbed, by how much,
what learns, and which detectors it can train.
"""

from __future__ import annotations

import pytest
import torch

from detrellis.errors import UserError
from detrellis.recipes.build import build
from detrellis.schemes.base import Step
from detrellis.schemes.denoising import lay_out, positives, unused
from detrellis.schemes.dn import Denoising, disturb, draw_noise
from detrellis.set_loss import SetLoss
from detrellis.supervision import leaving_out
from detrellis.types import DecoderOutput, Targets

from ..small import CLASSES, images, small, targets


def test_boxes_move_within_their_reach() -> None:
    truth = targets((500,), side=0.2)
    truth.boxes[:, :2] = 0.5
    layout = lay_out(truth, 2, 1)
    noise = draw_noise(len(layout.slot), CLASSES, torch.Generator().manual_seed(0))
    _, boxes = disturb(truth, layout, noise, flip=0.0, scale=0.4)
    centre, size = (boxes[:, :2] - 0.5).abs() / 0.1, (boxes[:, 2:] - 0.2).abs() / 0.2
    for moved in (centre, size):
        assert moved.max() <= 0.4 + 1e-5
        assert moved.mean() == pytest.approx(0.2, abs=0.02)


def test_a_fifth_of_the_labels_is_redrawn() -> None:
    truth = targets((3000,))
    truth = truth._replace(labels=torch.zeros_like(truth.labels))
    layout = lay_out(truth, 1, 1)
    noise = draw_noise(len(layout.slot), 1000, torch.Generator().manual_seed(0))
    labels, _ = disturb(truth, layout, noise, flip=0.2, scale=0.0)
    assert (labels != 0).float().mean() == pytest.approx(0.2, abs=0.03)


def step_of(name: str, truth: Targets, *overrides: str) -> tuple[Denoising, Step]:
    model = build(small(name).override(list(overrides)), CLASSES)
    scheme = model.training_schemes[0]
    assert isinstance(scheme, Denoising)
    return scheme, model.begin(images(tuple((64, 96) for _ in truth.sizes)), truth)


@pytest.mark.parametrize(("total", "groups"), [(None, 5), (100, 33), (3, 1), (1, 1)])
def test_groups_are_fixed_or_follow_a_total(total: int | None, groups: int) -> None:
    scheme, step = step_of(
        "dn_detr_r50", targets((2, 3)), f"schemes.dn.total={'null' if total is None else total}"
    )
    (block,) = scheme.extend(step).blocks
    assert block.copies == groups
    assert block.queries.content.shape[1] == groups * 3
    assert block.normaliser is not None
    assert float(block.normaliser) == groups * 5


@pytest.mark.parametrize("name", ["dn_detr_r50", "dn_deformable_detr_r50"])
def test_the_indicator_tells_denoising_queries_from_the_others(name: str) -> None:
    truth = targets((1, 3))
    scheme, step = step_of(name, truth)
    (block,) = scheme.extend(step).blocks
    assert (step.queries.content[..., -1] == 0).all()
    filled = torch.zeros(2, block.queries.content.shape[1], dtype=torch.bool)
    layout = lay_out(truth, 5, 1)
    filled[layout.image, layout.slot] = True
    assert (block.queries.content[..., -1] == filled).all()
    assert block.queries.boxes is not None
    assert (block.queries.boxes[~filled] == 0.5).all()


def test_slots_that_an_image_does_not_fill_learn_nothing() -> None:
    truth = targets((1, 3))
    layout = lay_out(truth, 2, 1)
    known = positives(layout, 2)
    logits = torch.randn(2, 2, layout.slots, CLASSES, requires_grad=True)
    boxes = torch.rand(2, 2, layout.slots, 4)
    filled = torch.zeros(2, layout.slots, dtype=torch.bool)
    filled[layout.image, layout.slot] = True

    def gradients(rule: object) -> torch.Tensor:
        terms = rule(DecoderOutput(logits, boxes, boxes), truth, known, torch.tensor(8.0))  # type: ignore[operator]
        (found,) = torch.autograd.grad(terms["class"].sum(), logits)
        return found

    assert (gradients(SetLoss())[:, ~filled] != 0).all()
    silent = gradients(leaving_out(SetLoss(), unused(layout, 2)))
    assert (silent[:, ~filled] == 0).all()
    torch.testing.assert_close(silent[:, filled], gradients(SetLoss())[:, filled])


def test_padded_background_is_an_option() -> None:
    recipe = small("dn_detr_r50")
    losses = []
    for padded in (False, True):
        model = build(recipe.override([f"schemes.dn.padded_background={padded}"]), CLASSES).eval()
        model.reseed(0)
        losses.append(model(images(), targets((1, 6))).losses)
    assert losses[0]["dn/class/0"] < losses[1]["dn/class/0"]
    assert losses[0]["dn/box/0"] == losses[1]["dn/box/0"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("detr_r50", "queries are not boxes"), ("conditional_detr_r50", "queries are not boxes")],
)
def test_detectors_without_boxes_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(
        UserError, match=rf"dn cannot train {name.replace('_', '-')}: .*{reason}"
    ) as error:
        build(small(name, ["dn"]), CLASSES)
    assert "dab-detr-r50" in error.value.remedy


@pytest.mark.parametrize("name", ["tiny", "dab_detr_r50", "dab_deformable_detr_r50"])
def test_it_trains_any_detector_with_box_queries(name: str) -> None:
    model = build(small(name, ["none", "dn=2"]), CLASSES)
    losses = model(images(), targets((2, 3))).losses
    assert all(v.isfinite() for v in losses.values())
    assert "dn/class/1" in losses
