"""Parameter groups, the schedule, and the averaged weights."""

from __future__ import annotations

import copy

import pytest
import torch

from detrellis.engine.ema import EMA
from detrellis.engine.optim import (
    build_optimizer,
    check_warmup,
    layer_factors,
    schedule_factor,
    set_learning_rate,
)
from detrellis.errors import UserError
from detrellis.recipes.build import build
from detrellis.recipes.config import ScheduleConfig

from ..small import CLASSES, small


def test_groups_hold_every_trained_parameter_once_with_its_rate() -> None:
    recipe = small("deformable_detr_r50").override(
        ["optim.lr=2e-4", "detector.backbone.norm=frozen"]
    )
    model = build(recipe, CLASSES)
    optimizer = build_optimizer(model, recipe.optim)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(rate)
    assert set(rate) == {id(p) for p in model.parameters() if p.requires_grad}
    slow = {n for n, p in model.named_parameters() if rate.get(id(p)) == pytest.approx(2e-5)}
    assert any("backbone" in n for n in slow)
    assert {
        n
        for n, _ in model.named_parameters()
        if "sampling_offsets" in n or "queries.reference" in n
    } <= slow
    assert all("backbone" in n or "sampling_offsets" in n or "queries.reference" in n for n in slow)
    set_learning_rate(optimizer, 1e-3)
    assert {round(g["lr"], 12) for g in optimizer.param_groups} == {1e-3, 1e-4}


def test_norms_may_go_without_weight_decay() -> None:
    recipe = small("align_dino_r50")
    model = build(recipe, CLASSES)
    decays = {
        id(p): g["weight_decay"]
        for g in build_optimizer(model, recipe.optim).param_groups
        for p in g["params"]
    }
    names = {n for n, p in model.named_parameters() if decays.get(id(p)) == 0}
    assert "detector.decoder.layers.0.norm_self.weight" in names
    assert "detector.neck.projections.0.1.weight" in names
    assert not any("attention" in n or "heads" in n or "schemes" in n for n in names)
    usual = build_optimizer(model, recipe.optim.model_copy(update={"decay_norms": True}))
    assert all(g["weight_decay"] == 1e-4 for g in usual.param_groups)


def test_step_schedule() -> None:
    config = ScheduleConfig(shape="step", drops=(0.5, 0.8))
    assert [round(schedule_factor(p, 1, config), 9) for p in (0, 0.49, 0.5, 0.79, 0.8, 0.99)] == [
        1,
        1,
        0.1,
        0.1,
        0.01,
        0.01,
    ]


def test_cosine_schedule_with_warmup() -> None:
    config = ScheduleConfig(shape="cosine", warmup=0.1, final=0.2)
    assert schedule_factor(0, 100, config) == 0
    assert schedule_factor(5, 100, config) == pytest.approx(0.5)
    assert schedule_factor(10, 100, config) == pytest.approx(1)
    assert schedule_factor(55, 100, config) == pytest.approx(0.6)
    assert schedule_factor(100, 100, config) == pytest.approx(0.2)


def test_a_flat_part_before_the_cosine_holds_the_warmup() -> None:
    config = ScheduleConfig(shape="cosine", warmup=0.1, flat=0.5, final=0.2)
    assert schedule_factor(5, 100, config) == pytest.approx(0.5)
    assert [schedule_factor(step, 100, config) for step in (10, 30, 50)] == pytest.approx([1, 1, 1])
    assert schedule_factor(75, 100, config) == pytest.approx(0.6)
    assert schedule_factor(100, 100, config) == pytest.approx(0.2)


def test_a_warmup_in_steps_does_not_follow_the_length_of_the_run() -> None:
    config = ScheduleConfig(shape="cosine", warmup_steps=10)
    for steps in (20, 1000):
        assert [schedule_factor(step, steps, config) for step in (0, 5, 10)] == pytest.approx(
            [0, 0.5, 1]
        )
    assert schedule_factor(15, 20, config) == pytest.approx(0.5)
    check_warmup(11, config)
    with pytest.raises(UserError, match=r"warmup_steps=10: the whole run has 10 steps"):
        check_warmup(10, config)


@pytest.mark.parametrize(
    ("backbone", "blocks"),
    [
        ("resnet18", 6),
        ("test_resnet", 3),
        ("swin_tiny_patch4_window7_224", 10),
        ("tf_efficientnet_lite0", 16),
    ],
)
def test_the_learning_rate_falls_with_depth(backbone: str, blocks: int) -> None:
    """The stem learns least, and all that is no backbone as ever."""
    recipe = small("tiny").override(
        [
            f"detector.backbone.name={backbone}",
            "detector.backbone.strides=[8, 16]",
            "optim.layer_decay=0.5",
        ]
    )
    model = build(recipe, CLASSES)
    names = [name for name, _ in model.named_parameters()]
    factors = layer_factors(names, 0.5)
    depths = sorted({factors[name] for name in names if "backbone." in name} - {1.0}, reverse=True)
    assert depths == [0.5**i for i in range(1, blocks + 2)]
    assert factors[next(name for name in names if "backbone." in name)] == min(depths)
    assert {factors[name] for name in names if "backbone." not in name} == {1.0}
    scaled = recipe.optim.replace(scaled={"backbone": 0.1})
    rates = {
        id(p): g["lr"] for g in build_optimizer(model, scaled).param_groups for p in g["params"]
    }
    for name, parameter in model.named_parameters():
        factor = 0.1 * factors[name] if "backbone" in name else 1.0
        assert rates[id(parameter)] == pytest.approx(recipe.optim.lr * factor), name


def test_a_backbone_without_known_blocks_has_no_layer_decay() -> None:
    with pytest.raises(UserError, match=r"optim\.layer_decay=0\.8.*blocks"):
        layer_factors(["detector.backbone.model.conv.weight", "detector.neck.weight"], 0.8)


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
