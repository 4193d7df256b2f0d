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
