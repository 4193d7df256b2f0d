"""A step's host reads from its device once, the costs of matching; Co-DETR's heads, whose positives
are as many as the boxes say, read more often."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from detrellis.engine.optim import build_optimizer
from detrellis.recipes.build import build
from detrellis.schemes.collaborative import paa
from detrellis.schemes.config import BranchName, SchemesConfig

from .small import NAMES, distinct, images, small, targets, with_bitmaps
from .waits import as_on_a_gpu, counted_waits

RECIPES = {name: small(name) for name in NAMES}
KINDS = [name for name in distinct(RECIPES) if RECIPES[name].schemes.co is None]
# What no recipe has, or not together
STACKS = (
    ("tiny", "none"),
    ("tiny", "align=2", "group=3", "cdn"),
    ("tiny", "hybrid=2", "stable"),
    ("tiny", "federated", "dense", "cdn"),
    ("conditional_detr_r50", "group=3"),
)
MOST = {
    "atss": 3,
    "fcos": 3,
    "gfl": 3,
    "retinanet": 3,
    "paa": 16,
    "rcnn": 8,
    "rcnn+atss": 10,
}  # two images


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    # PAA's mixtures are of the host, whose reads are no waits, and as many as the weights ask for
    monkeypatch.setattr(paa, "likely_positives", lambda losses: losses == losses[:, :1])


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


@pytest.mark.parametrize("case", [*((name,) for name in KINDS), *STACKS], ids=" ".join)
def test_one_wait_a_step(case: tuple[str, ...]) -> None:
    assert waits_of(*case) == ["cpu"]


@pytest.mark.parametrize("branches", MOST)
def test_co_waits_no_more_than_it_did(branches: str) -> None:
    assert 1 < len(waits_of("tiny", f"co={branches}")) <= MOST[branches]


def test_every_scheme_and_head_is_among_them() -> None:
    trained = [*(RECIPES[name] for name in KINDS), *(small(*case[:1], case[1:]) for case in STACKS)]
    seen = {name for recipe in trained for name, scheme in recipe.schemes if scheme is not None}
    assert seen | {"co"} == set(SchemesConfig.model_fields)
    branches = {recipe.schemes.co.branches for recipe in RECIPES.values() if recipe.schemes.co}
    assert {"+".join(each) for each in branches} | set(get_args(BranchName)) - {"mask"} <= set(MOST)


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
        x.to("cpu")
        torch.equal(x, x)
        torch.tensor([1.0], device=x.device)
        x.new_tensor([1.0])
        torch.tensor([1.0]).to(x.device, non_blocking=True)
        x.new_full((), 1.0)
        x.to(x.device)
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
        "to",
        "equal",
        "tensor",
        "new_tensor",
    ]
