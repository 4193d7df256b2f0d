"""Group DETR on every base of the paper's tables, 12 epochs;
`-o schedule.epochs=50 -o schedule.drops=[0.8]` for 50.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from detrellis.recipes import conditional, dab, dino
from detrellis.recipes.config import Recipe, Recipes, ScheduleConfig
from detrellis.schemes.config import DNConfig, GroupConfig


def _grouped(make: Callable[[], Recipe], *, k: int) -> Recipe:
    """A base with `k` groups; denoising, where it has some,
    keeps to 100 queries (DN-DETR's dynamic groups).
    """
    base = make()
    changes = {"group": GroupConfig(k=k)}
    if base.schemes.dn is not None:
        changes["dn"] = DNConfig(total=100)  # type: ignore[assignment]
    return base.model_copy(
        update={
            "name": f"group-{base.name}",
            "about": f"Group DETR, {k} groups, on {base.about}",
            "schemes": base.schemes.model_copy(update=changes),
            "schedule": ScheduleConfig(epochs=12, drops=(11 / 12,)),
        }
    )


_BASES = {
    **conditional.RECIPES,
    **dab.RECIPES,
    "dab-deformable-detr-r50": dab.dab_deformable_detr_r50,
    "dino-r50": dino.dino_r50,
}
RECIPES: Recipes = {
    f"group-{name}": partial(_grouped, base, k=3 if name == "dino-r50" else 11)
    for name, base in _BASES.items()
}
