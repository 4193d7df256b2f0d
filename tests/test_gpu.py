"""On a GPU a step is the CPU's:
same losses and gradients, and finite ones in bf16. Skipped without a GPU.
"""

from __future__ import annotations

import math

import pytest
import torch

from detrellis.data.masks import SIDE
from detrellis.recipes.build import build
from detrellis.recipes.config import Recipe

from .small import CLASSES, NAMES, images, small, targets

STACKS = (
    ("tiny", ("align", "group=3")),
    ("tiny", ("align", "group=3", "co=rcnn+atss")),
    ("tiny", ("co=retinanet+fcos+paa+gfl",)),
    ("tiny", ("stable", "hybrid")),
    ("tiny", ("co=mask",)),
    ("sam_detr_plus_r50_smca_dn", ("align", "group=3")),
)
CASES = [pytest.param(name, (), id=name) for name in NAMES]
CASES += [pytest.param(name, schemes, id=f"{name} {'+'.join(schemes)}") for name, schemes in STACKS]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def step(
    recipe: Recipe, device: str, amp: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """Losses, and the norm of each parameter's gradient.

    Weights are moved off their initial values, with which samples lie on the borders of cells and
    boxes on targets: there the derivative is whatever rounding makes it.
    """
    model = build(recipe, CLASSES).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.to(device).reseed(0)
    truth = targets((2, 3))
    if recipe.needs_masks:
        truth = truth._replace(masks=torch.ones(5, SIDE, SIDE, dtype=torch.bool))
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        losses = model(images(((64, 96), (64, 80))).to(device), truth.to(device)).losses
    torch.stack(list(losses.values())).sum().backward()
    norms = {
        name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None
    }
    return {name: loss.item() for name, loss in losses.items()}, norms


@pytest.mark.parametrize(("name", "schemes"), CASES)
def test_a_step_equals_that_of_the_cpu(
    name: str, schemes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    recipe = small(name, schemes).override(
        ["detector.dropout=0.0", "detector.backbone.drop_path=0.0"]
    )
    expected, norms = step(recipe, "cpu")
    losses, found = step(recipe, "cuda")
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert found == pytest.approx(norms, rel=0.02, abs=1e-3)
    losses, found = step(recipe, "cuda", amp=True)
    assert sum(losses.values()) == pytest.approx(sum(expected.values()), rel=0.1)
    assert [name for name, norm in found.items() if not math.isfinite(norm)] == []
