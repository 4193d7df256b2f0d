"""What `benchmarks/rivals.py` trains: rows beside a small DINO that can be built."""

from __future__ import annotations

import pytest
import torch
from benchmarks.rivals import BASE, ROWS, row

from detrellis.recipes import find_recipe, tiny_sized
from detrellis.recipes.build import build
from detrellis.study.plan import flat


@pytest.mark.parametrize("name", ROWS)
def test_a_rival_is_the_base_with_what_it_names(name: str) -> None:
    base = tiny_sized(find_recipe("dino-r50")).override("schedule.epochs=4")
    found = row(name, base)
    assert found.against == (None if name == BASE else BASE)
    schemes, _ = ROWS[name]
    trained = {n for n, dials in found.recipe.schemes.model_dump().items() if dials is not None}
    assert trained == {BASE, *schemes}
    before, after = (flat(recipe.model_dump(mode="json")) for recipe in (base, found.recipe))
    changed = {
        key.split(".")[0] for key in {**before, **after} if before.get(key) != after.get(key)
    }
    assert changed <= {"detector", "schemes", "loss"}
    assert bool(changed) == (name != BASE)
    with torch.device("meta"):
        build(found.recipe, 3)
