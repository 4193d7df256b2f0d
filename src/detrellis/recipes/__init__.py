"""Recipes: names, and plain functions that return a `Recipe`.
Importing them does not import torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

from detrellis.errors import UserError
from detrellis.fields import unknown_name
from detrellis.recipes import (
    align,
    co,
    conditional,
    dab,
    ddq,
    deformable,
    detr,
    dfine,
    dino,
    group,
    lvis,
    lwdetr,
    mask2former,
    maskdino,
    rivals,
    rtdetr,
    sam,
    vit,
)
from detrellis.recipes.config import Recipe, Recipes
from detrellis.recipes.scale import tiny_sized

__all__ = ["RECIPES", "Recipe", "find_recipe", "tiny_sized"]

RECIPES: Recipes = {
    "small": dino.small,
    "tiny": dino.tiny,
    **detr.RECIPES,
    **conditional.RECIPES,
    **dab.RECIPES,
    **deformable.RECIPES,
    **dab.DEFORMABLE_RECIPES,
    **dino.RECIPES,
    **ddq.RECIPES,
    **align.RECIPES,
    **group.RECIPES,
    **co.RECIPES,
    **lvis.RECIPES,
    **vit.RECIPES,
    **sam.RECIPES,
    **mask2former.RECIPES,
    **maskdino.RECIPES,
    **rtdetr.RECIPES,
    **dfine.RECIPES,
    **lwdetr.RECIPES,
    **rivals.RECIPES,
}


def choose_recipe(
    recipe: str | Recipe | None,
    scale: Literal["tiny"] | None = None,
    scheme: str | Sequence[str] = (),
    override: str | Sequence[str] = (),
) -> Recipe:
    """A recipe, or that of a name, with what is wanted otherwise: see `detrellis.train`.
    `UserError` where there is no such recipe, scheme or field."""
    if recipe is None:
        raise UserError(
            "train: which recipe?",
            "For example: detrellis train small --data my_data. See detrellis recipes. "
            "Or start from a trained one with its own recipe: --weights RUN.",
        )
    chosen = find_recipe(recipe) if isinstance(recipe, str) else recipe
    if scale is not None:
        chosen = tiny_sized(chosen)
    return chosen.with_schemes(scheme, override)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, with `_` for `-` and capitals too;
    `UserError` with those of its kind otherwise.
    """
    plain = name.strip().lower().replace("_", "-")
    if plain in RECIPES:
        return RECIPES[plain]()
    alike = [known for known in RECIPES if plain and known.startswith(plain)]
    if alike:
        raise UserError(f"recipe: there is no {name!r}", f"Did you mean {' or '.join(alike[:4])}?")
    if difflib.get_close_matches(plain, RECIPES, n=1, cutoff=0.5):
        raise unknown_name(plain, list(RECIPES), "recipe")
    raise UserError(
        f"recipe: there is no {name!r}",
        "detrellis recipes lists them; tiny is one for small data and CPUs.",
    )
