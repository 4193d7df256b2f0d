"""A step's host waits for its device once, for the costs of matching; Co-DETR's heads, whose
positives are as many as the boxes say, wait more often. `train` adds one wait, for the loss."""

from __future__ import annotations

import pytest
import torch

from detrellis.engine.optim import build_optimizer
from detrellis.recipes.build import build

from .small import images, small, targets, with_bitmaps
from .waits import counted_waits

ONCE = (
    ("tiny", "none"),
    ("tiny", "align=2", "group=3", "cdn"),
    ("tiny", "hybrid=2", "stable"),
    ("dn_detr_r50",),
    ("conditional_detr_r50", "group=3"),
    ("rtdetr_r18",),
    ("dfine_s",),
    ("mask2former_r50",),
)
MOST = {
    "co=atss": 4,
    "co=fcos": 4,
    "co=paa": 21,
    "co=rcnn": 14,
}  # two images; PAA's include its host's


def waits_of(name: str, *schemes: str) -> list[str]:
    """What a whole step waits for, the second: what shapes alone decide is there."""
    recipe = small(name, schemes)
    model = build(recipe, 5).train()
    optimizer, parameters = build_optimizer(model, recipe.optim), list(model.parameters())
    batch = images()
    truth = targets((3, 2)) if model.sampling is None else with_bitmaps(targets((3, 2)), batch)
    for _ in range(2):
        model.reseed(0)
        optimizer.zero_grad(set_to_none=True)
        with counted_waits() as waits:
            losses = model(batch, truth).losses
            torch.stack(list(losses.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.optim.clip)
            optimizer.step()
    return waits


@pytest.mark.parametrize("case", ONCE, ids=" ".join)
def test_one_wait_a_step(case: tuple[str, ...]) -> None:
    assert waits_of(*case) == ["cpu"]


@pytest.mark.parametrize("scheme", MOST)
def test_co_waits_no_more_than_it_did(scheme: str) -> None:
    assert 1 < len(waits_of("tiny", scheme)) <= MOST[scheme]


def test_every_kind_of_wait_is_seen() -> None:
    x = torch.arange(4)
    with counted_waits() as waits:
        x.sum().item()
        bool(x.any())
        x[x > 1]
        x[x > 1] = torch.tensor([0, 1])
        x.nonzero()
        x.repeat_interleave(x)
        x.tolist()
        x.cpu()
        x.repeat_interleave(2)
        x[torch.tensor([0, 1])]
    assert waits == [
        *["_local_scalar_dense"] * 2,
        "index",
        "index_put_",
        "nonzero",
        "repeat_interleave",
        "tolist",
        "cpu",
    ]
