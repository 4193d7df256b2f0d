"""The recipes of large-scale jitter, LVIS and Objects365, as their papers have them."""

from __future__ import annotations

import pytest

from detrellis.recipes import find_recipe
from detrellis.recipes.backbones import EvaViTConfig
from detrellis.recipes.refuse import refuse


@pytest.mark.parametrize(
    ("name", "side", "epochs", "paste", "pad"),
    [
        ("co-dino-r50-lsj", 1024, 12, 1.0, 114),
        ("co-dino-r50-lsj-36e", 1024, 36, 1.0, 114),
        ("co-dino-swin-l-lsj", 1280, 36, 1.0, 114),
        ("dino-r50-lsj", 1024, 12, None, 128),
    ],
)
def test_large_scale_jitter(
    name: str, side: int, epochs: int, paste: float | None, pad: int
) -> None:
    recipe = find_recipe(name)
    refuse(recipe)
    data = recipe.data
    assert (data.size, data.augment, data.copy_paste, data.pad) == ((side, side), "lsj", paste, pad)
    assert recipe.schedule.epochs == epochs
    assert recipe.name == name


@pytest.mark.parametrize(
    ("name", "side", "epochs", "detections", "noise"),
    [
        ("co-dino-r50-lvis", 1024, 12, 300, 1.0),
        ("co-dino-swin-l-lvis", 1280, 36, 300, 1.0),
        ("co-dino-swin-l-lvis-finetune", 1536, 16, 1000, 0.4),
    ],
)
def test_lvis(name: str, side: int, epochs: int, detections: int, noise: float) -> None:
    recipe = find_recipe(name)
    refuse(recipe)
    assert (recipe.data.size, recipe.data.copy_paste, recipe.data.repeat_threshold) == (
        (side, side),
        1.0,
        0.0,
    )
    assert (recipe.schedule.epochs, recipe.detector.top_k) == (epochs, detections)
    assert recipe.schemes.federated is not None
    assert recipe.schemes.cdn is not None
    assert recipe.schemes.cdn.box_noise == noise
    assert recipe.name == name


@pytest.mark.parametrize(
    ("name", "window", "first", "extent", "queries", "noise", "rate", "batch"),
    [
        ("co-dino-vit-l", 24, 3, None, 1500, 300, 5e-5, 64),
        ("co-dino-vit-l-lvis", 16, 2, 96, 900, 300, 5e-5, 64),
        ("co-dino-vit-l-objects365", 24, 3, None, 1500, 1000, 2.5e-4, 224),
        ("co-dino-vit-l-objects365-lsj", 16, 2, 80, 900, 1000, 2e-4, 192),
    ],
)
def test_vit_l(
    name: str,
    window: int,
    first: int,
    extent: int | None,
    queries: int,
    noise: int,
    rate: float,
    batch: int,
) -> None:
    recipe = find_recipe(name)
    refuse(recipe)
    backbone, cdn = recipe.detector.backbone, recipe.schemes.cdn
    assert isinstance(backbone, EvaViTConfig)
    assert (backbone.window, backbone.global_blocks[0], backbone.extent) == (window, first, extent)
    assert len(backbone.global_blocks) == (6 if window == 24 else 8)
    assert cdn is not None
    assert (recipe.detector.queries.count, cdn.number, cdn.box_noise) == (queries, noise, 0.4)
    assert (recipe.optim.lr, recipe.optim.batch_size, recipe.schedule.warmup_steps) == (
        rate,
        batch,
        500,
    )
    assert recipe.optim.layer_decay == (1.0 if name.endswith("-lvis") else 0.8)
    assert (recipe.data.unreadable == "replace") == ("objects365" in name)
    assert (recipe.data.copy_paste is None) == (not name.endswith("-lvis"))
    assert recipe.name == name
