"""Invariant 2 of docs/architecture.md:
building draws from its seed alone. Of schemes, test_stacks.py shows it.
"""

from __future__ import annotations

import torch

from detrellis.recipes.build import build_untrained

from ..small import CLASSES
from .models import every_detector, every_recipe, make, recipe_of


@every_recipe
def test_building_draws_from_its_seed_and_leaves_the_global_generator_alone(name: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = make(name)
    assert torch.equal(torch.rand(1), expected)
    another_seed = make(name, seed=1)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(model.parameters(), another_seed.parameters(), strict=True)
    )


@every_detector
def test_a_network_that_is_filled_is_the_one_that_was_built(name: str) -> None:
    """No weights are drawn for it; what is no weight, and is in no file, has to be there."""
    built, filled = make(name).detector, build_untrained(recipe_of(name, "own"), CLASSES)
    filled.load_state_dict(built.state_dict())
    for one, other in (
        (built.parameters(), filled.parameters()),
        (built.buffers(), filled.buffers()),
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
