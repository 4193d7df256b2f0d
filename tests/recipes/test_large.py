"""The recipes of large-scale jitter, LVIS and Objects365, as their papers have them."""

from __future__ import annotations

import pytest

from detrellis.recipes import find_recipe
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
def test_large_scale_jitter(name: str, side: int, epochs: int, paste: float | None, pad: int) -> None:
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
    assert (recipe.data.size, recipe.data.copy_paste, recipe.data.repeat_threshold) == ((side, side), 1.0, 0.0)
    assert (recipe.schedule.epochs, recipe.detector.top_k) == (epochs, detections)
    assert recipe.schemes.federated is not None
    assert recipe.schemes.cdn is not None
    assert recipe.schemes.cdn.box_noise == noise
    assert recipe.name == name
