"""Invariant 2 of docs/architecture.md:
building draws from its seed alone. Of schemes, test_stacks.py shows it.
"""

from __future__ import annotations

import torch

from .models import every_recipe, make


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
