"""bf16 autocast: the step runs, what must stay float32 does,
and the losses stay near those of float32.
"""

from __future__ import annotations

import torch

from detrellis.recipes.build import build

from .contract.models import every_recipe, recipe_of
from .small import CLASSES, images, small, targets, with_bitmaps


@every_recipe
def test_a_step_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    recipe = recipe_of(name, "own").override(
        ["detector.dropout=0.0", "detector.backbone.drop_path=0.0"]
    )
    model = build(recipe, CLASSES)
    model.train()
    batch = images(((64, 96), (64, 80)))
    truth = with_bitmaps(targets((2, 3)), batch)
    totals = []
    for enabled in (False, True):
        model.reseed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(batch, truth)
        assert all(v.dtype == torch.float32 for v in out.losses.values())
        totals.append(torch.stack(list(out.losses.values())).sum())
    totals[1].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # A rounding may rank or match differently; of MS-DETR's pairs there are more or fewer then.
    near = 0.1 if recipe.schemes.ms is None else 0.25
    torch.testing.assert_close(totals[1], totals[0], rtol=near, atol=0)


@torch.no_grad()
def test_boxes_stay_float32() -> None:
    model = build(small("tiny"), CLASSES).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.detector(images()).boxes.dtype == torch.float32
