"""Parameter groups, the schedule, and the averaged weights."""

from __future__ import annotations

import copy

import pytest
import torch

from detrellis.engine.ema import EMA
from detrellis.engine.optim import build_optimizer, schedule_factor, set_learning_rate
from detrellis.recipes.build import build
from detrellis.recipes.config import ScheduleConfig

from ..small import CLASSES, small


def test_groups_hold_every_trained_parameter_once_with_its_rate() -> None:
    recipe = small("deformable_detr_r50").override(["optim.lr=2e-4", "detector.backbone.norm=frozen"])
    model = build(recipe, CLASSES)
    optimizer = build_optimizer(model, recipe.optim)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(rate)
    assert set(rate) == {id(p) for p in model.parameters() if p.requires_grad}
    slow = {n for n, p in model.named_parameters() if rate.get(id(p)) == pytest.approx(2e-5)}
    assert any("backbone" in n for n in slow)
    assert {n for n, _ in model.named_parameters() if "sampling_offsets" in n or "queries.reference" in n} <= slow
    assert all("backbone" in n or "sampling_offsets" in n or "queries.reference" in n for n in slow)
    set_learning_rate(optimizer, 1e-3)
    assert {round(g["lr"], 12) for g in optimizer.param_groups} == {1e-3, 1e-4}


def test_norms_may_go_without_weight_decay() -> None:
    recipe = small("align_dino_r50")
    model = build(recipe, CLASSES)
    decays = {id(p): g["weight_decay"] for g in build_optimizer(model, recipe.optim).param_groups for p in g["params"]}
    names = {n for n, p in model.named_parameters() if decays.get(id(p)) == 0}
    assert "detector.decoder.layers.0.norm_self.weight" in names
    assert "detector.neck.projections.0.1.weight" in names
    assert not any("attention" in n or "heads" in n or "schemes" in n for n in names)
    usual = build_optimizer(model, recipe.optim.model_copy(update={"decay_norms": True}))
    assert all(g["weight_decay"] == 1e-4 for g in usual.param_groups)


def test_step_schedule() -> None:
    config = ScheduleConfig(shape="step", drops=(0.5, 0.8))
    assert [round(schedule_factor(p, config), 9) for p in (0, 0.49, 0.5, 0.79, 0.8, 0.99)] == [
        1,
        1,
        0.1,
        0.1,
        0.01,
        0.01,
    ]


def test_cosine_schedule_with_warmup() -> None:
    config = ScheduleConfig(shape="cosine", warmup=0.1, final=0.2)
    assert schedule_factor(0.0, config) == 0
    assert schedule_factor(0.05, config) == pytest.approx(0.5)
    assert schedule_factor(0.1, config) == pytest.approx(1)
    assert schedule_factor(0.55, config) == pytest.approx(0.6)
    assert schedule_factor(1.0, config) == pytest.approx(0.2)


def test_average_follows_the_formula_and_leaves_the_detector_alone() -> None:
    detector = build(small("tiny"), CLASSES).detector
    ema = EMA(detector, decay=0.5)
    start = copy.deepcopy(detector.state_dict())
    with torch.no_grad():
        for p in detector.parameters():
            p.add_(1.0)
    moved = copy.deepcopy(detector.state_dict())
    ema.update(detector, 1)
    decay = 2 / 11  # (1 + 1) / (10 + 1), below 0.5
    for name, value in ema.detector.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, start[name] * decay + moved[name] * (1 - decay))
        assert torch.equal(detector.state_dict()[name], moved[name])
    ema.update(detector, 10**6)
    name = "decoder.heads.classes.0.weight"
    expected = (start[name] * decay + moved[name] * (1 - decay)) * 0.5 + moved[name] * 0.5
    torch.testing.assert_close(ema.detector.state_dict()[name], expected)
    assert not any(p.requires_grad for p in ema.detector.parameters())
