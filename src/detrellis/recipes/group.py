"""Group DETR on every base of the paper's tables, 12 epochs; `-o schedule.epochs=50 -o schedule.drops=[0.8]` for 50."""

from __future__ import annotations

from detrellis.recipes.conditional import conditional_detr_r50, conditional_detr_r50_dc5
from detrellis.recipes.config import Recipe, ScheduleConfig
from detrellis.recipes.dab import (
    dab_deformable_detr_r50,
    dab_detr_r50,
    dab_detr_r50_dc5,
    dn_detr_r50,
    dn_detr_r50_dc5,
)
from detrellis.recipes.dino import dino_r50
from detrellis.recipes.schemes import DNConfig, GroupConfig


def _grouped(base: Recipe, *, k: int = 11) -> Recipe:
    """The base with `k` groups; denoising, where it has some, keeps to 100 queries (DN-DETR's dynamic groups)."""
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


def group_conditional_detr_r50() -> Recipe:
    """On Conditional DETR."""
    return _grouped(conditional_detr_r50())


def group_conditional_detr_r50_dc5() -> Recipe:
    """On Conditional DETR with the dilated last stage."""
    return _grouped(conditional_detr_r50_dc5())


def group_dab_detr_r50() -> Recipe:
    """On DAB-DETR."""
    return _grouped(dab_detr_r50())


def group_dab_detr_r50_dc5() -> Recipe:
    """On DAB-DETR with the dilated last stage."""
    return _grouped(dab_detr_r50_dc5())


def group_dn_detr_r50() -> Recipe:
    """On DN-DETR."""
    return _grouped(dn_detr_r50())


def group_dn_detr_r50_dc5() -> Recipe:
    """On DN-DETR with the dilated last stage."""
    return _grouped(dn_detr_r50_dc5())


def group_dab_deformable_detr_r50() -> Recipe:
    """On DAB-Deformable-DETR."""
    return _grouped(dab_deformable_detr_r50())


def group_dino_r50() -> Recipe:
    """On DINO: 3 groups of 900 queries, each with its proposal head."""
    return _grouped(dino_r50(), k=3)
