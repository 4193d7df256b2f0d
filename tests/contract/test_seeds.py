"""Invariant 2 of docs/architecture.md: a scheme changes neither the detector's first weights nor its output."""

from __future__ import annotations

import pytest
import torch

from ..small import images
from .models import every_recipe, every_stack, flat, make, make_plain

pytestmark = pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")  # stacks of two that do the same work


@every_stack
def test_schemes_do_not_change_the_detector(name: str, stack: str) -> None:
    one, other = make(name, stack), make_plain(name, stack)
    expected = other.detector.state_dict()
    for key, value in one.detector.state_dict().items():
        assert torch.equal(value, expected[key]), key
    with torch.no_grad():
        assert torch.equal(flat(one.detector.eval()(images())), flat(other.detector.eval()(images())))


@every_recipe
def test_building_draws_from_its_seed_and_leaves_the_global_generator_alone(name: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = make(name)
    assert torch.equal(torch.rand(1), expected)
    another_seed = make(name, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), another_seed.parameters(), strict=True))
