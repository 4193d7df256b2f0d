"""Recipes: plain functions that return a `Recipe`. Importing them does not import torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Literal

from detrellis.errors import UserError
from detrellis.fields import unknown_name
from detrellis.recipes.align import (
    align_dab_detr_r50,
    align_dab_detr_r50_dc5,
    align_dab_detr_r101_dc5,
    align_dino_r50,
    align_dino_r50_24e,
    align_dino_r50_ia_bce,
    align_h_deformable_detr_r50,
    h_deformable_detr_r50,
    stable_dino_r50,
)
from detrellis.recipes.co import (
    co_conditional_detr_r50,
    co_dab_detr_r50,
    co_deformable_detr_r50,
    co_deformable_detr_r50_k1,
    co_dino_r50,
    co_dino_r50_9enc,
    co_dino_swin_l,
)
from detrellis.recipes.conditional import conditional_detr_r50, conditional_detr_r50_dc5
from detrellis.recipes.config import Recipe
from detrellis.recipes.dab import (
    dab_deformable_detr_r50,
    dab_detr_r50,
    dab_detr_r50_dc5,
    dn_deformable_detr_r50,
    dn_detr_r50,
    dn_detr_r50_dc5,
)
from detrellis.recipes.deformable import (
    deformable_detr_r50,
    deformable_detr_r50_refine,
    deformable_detr_r50_two_stage,
    deformable_detr_r50_two_stage_plus,
    deformable_detr_swin_l,
)
from detrellis.recipes.detr import detr_r50, detr_r50_dc5
from detrellis.recipes.dino import dino_r50, dino_r50_5scale, dino_swin_l, tiny
from detrellis.recipes.group import (
    group_conditional_detr_r50,
    group_conditional_detr_r50_dc5,
    group_dab_deformable_detr_r50,
    group_dab_detr_r50,
    group_dab_detr_r50_dc5,
    group_dino_r50,
    group_dn_detr_r50,
    group_dn_detr_r50_dc5,
)
from detrellis.recipes.sam import (
    sam_detr_plus_r50,
    sam_detr_plus_r50_dn,
    sam_detr_plus_r50_smca,
    sam_detr_plus_r50_smca_dn,
    sam_detr_r50,
    sam_detr_r50_dc5,
    sam_detr_r50_dc5_dn,
    sam_detr_r50_dc5_smca,
    sam_detr_r50_dc5_smca_dn,
    sam_detr_r50_dn,
    sam_detr_r50_smca,
    sam_detr_r50_smca_dn,
    smca_detr_ms_r50,
    smca_detr_r50,
)
from detrellis.recipes.scale import tiny_sized

__all__ = ["RECIPES", "Recipe", "find_recipe", "tiny_sized"]

RECIPES: tuple[Callable[[], Recipe], ...] = (
    tiny,
    detr_r50,
    detr_r50_dc5,
    conditional_detr_r50,
    conditional_detr_r50_dc5,
    dab_detr_r50,
    dab_detr_r50_dc5,
    dn_detr_r50,
    dn_detr_r50_dc5,
    deformable_detr_r50,
    deformable_detr_r50_refine,
    deformable_detr_r50_two_stage,
    deformable_detr_r50_two_stage_plus,
    deformable_detr_swin_l,
    dab_deformable_detr_r50,
    dn_deformable_detr_r50,
    dino_r50,
    dino_r50_5scale,
    dino_swin_l,
    align_dino_r50,
    align_dino_r50_24e,
    align_dino_r50_ia_bce,
    align_dab_detr_r50,
    align_dab_detr_r50_dc5,
    align_dab_detr_r101_dc5,
    h_deformable_detr_r50,
    align_h_deformable_detr_r50,
    stable_dino_r50,
    group_conditional_detr_r50,
    group_conditional_detr_r50_dc5,
    group_dab_detr_r50,
    group_dab_detr_r50_dc5,
    group_dn_detr_r50,
    group_dn_detr_r50_dc5,
    group_dab_deformable_detr_r50,
    group_dino_r50,
    co_deformable_detr_r50,
    co_deformable_detr_r50_k1,
    co_dino_r50,
    co_dino_r50_9enc,
    co_dino_swin_l,
    co_conditional_detr_r50,
    co_dab_detr_r50,
    sam_detr_r50,
    sam_detr_r50_smca,
    sam_detr_r50_dn,
    sam_detr_r50_smca_dn,
    sam_detr_r50_dc5,
    sam_detr_r50_dc5_smca,
    sam_detr_r50_dc5_dn,
    sam_detr_r50_dc5_smca_dn,
    sam_detr_plus_r50,
    sam_detr_plus_r50_smca,
    sam_detr_plus_r50_dn,
    sam_detr_plus_r50_smca_dn,
    smca_detr_r50,
    smca_detr_ms_r50,
)


def choose_recipe(
    recipe: str | Recipe | None,
    scale: Literal["tiny"] | None = None,
    scheme: str | Sequence[str] = (),
    override: str | Sequence[str] = (),
) -> Recipe:
    """A recipe, or that of a name, with what is wanted otherwise: see `detrellis.train`. `UserError` where there is no
    such recipe, scheme or field."""
    if recipe is None:
        raise UserError(
            "train: which recipe?",
            "For example: detrellis train tiny --data my_data. See detrellis recipes. "
            "Or start from a trained one with its own recipe: --weights RUN.",
        )
    chosen = find_recipe(recipe) if isinstance(recipe, str) else recipe
    if scale is not None:
        chosen = tiny_sized(chosen)
    return chosen.with_schemes(scheme).override(override)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, with `_` for `-` and capitals too; `UserError` with those of its kind otherwise."""
    found = {make.__name__.replace("_", "-"): make for make in RECIPES}
    plain = name.strip().lower().replace("_", "-")
    if plain in found:
        return found[plain]()
    alike = [known for known in found if plain and known.startswith(plain)]
    if alike:
        raise UserError(f"recipe: there is no {name!r}", f"Did you mean {' or '.join(alike[:4])}?")
    if difflib.get_close_matches(plain, found, n=1, cutoff=0.5):
        raise unknown_name(plain, list(found), "recipe")
    raise UserError(
        f"recipe: there is no {name!r}", "detrellis recipes lists them; tiny is one for small data and CPUs."
    )
