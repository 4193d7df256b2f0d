"""Recipes: plain functions that return a `Recipe`. Importing them does not import torch."""

from __future__ import annotations

from collections.abc import Callable

from detrellis.recipes.config import Recipe, unknown_name
from detrellis.recipes.deformable import (
    deformable_detr_r50,
    deformable_detr_r50_refine,
    deformable_detr_r50_two_stage,
    deformable_detr_r50_two_stage_plus,
)
from detrellis.recipes.dino import dino_r50, dino_r50_5scale, tiny

__all__ = ["RECIPES", "Recipe", "find_recipe"]

RECIPES: tuple[Callable[[], Recipe], ...] = (
    tiny,
    deformable_detr_r50,
    deformable_detr_r50_refine,
    deformable_detr_r50_two_stage,
    deformable_detr_r50_two_stage_plus,
    dino_r50,
    dino_r50_5scale,
)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; `UserError` with the nearest one otherwise."""
    found = {r.__name__.replace("_", "-"): r for r in RECIPES}
    if name not in found:
        raise unknown_name(name, list(found), "recipe")
    return found[name]()
