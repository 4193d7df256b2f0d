"""Align-DETR on DINO, DAB-DETR and H-DETR, and what it is compared with:
H-DETR itself and Stable-DINO's loss.
"""

from __future__ import annotations

from typing import Any

from detrellis.recipes.config import Recipe, Recipes, ScheduleConfig
from detrellis.recipes.dab import dab_detr_r50, dab_detr_r50_dc5
from detrellis.recipes.deformable import deformable_detr_r50_two_stage_plus
from detrellis.recipes.dino import dino_r50
from detrellis.schemes.config import AlignConfig, HybridConfig, SchemesConfig, StableConfig


def _with(
    base: Recipe, name: str, about: str, *, epochs: int = 0, drop: int = 0, **schemes: Any
) -> Recipe:
    """The base with more schemes, and another length where one is given."""
    together = SchemesConfig(**({k: v for k, v in base.schemes if v is not None} | schemes))
    changes: dict[str, Any] = {"name": name, "about": about, "schemes": together}
    if epochs:
        changes["schedule"] = ScheduleConfig(epochs=epochs, drops=(drop / epochs,))
    return base.model_copy(update=changes)


def _detrex_dino() -> Recipe:
    """DINO as in the toolbox that Align-DETR and Stable-DINO are built on: heads for each layer,
    which matters where the last layer is matched otherwise than the others, and no weight decay on
    normalisation layers."""
    base = dino_r50()
    changes = {
        "detector": base.detector.replace(
            decoder=base.detector.decoder.replace(shared_heads=False)
        ),
        "optim": base.optim.model_copy(update={"decay_norms": False}),
    }
    return base.model_copy(update=changes)


def _aligned_dino(
    name: str, about: str, align: AlignConfig, *, epochs: int = 12, drop: int = 11
) -> Recipe:
    return _with(_detrex_dino(), name, about, epochs=epochs, drop=drop, align=align)


def align_dino_r50() -> Recipe:
    """Align-DETR, 12 epochs."""
    return _aligned_dino("align-dino-r50", "Align-DETR on DINO, ResNet-50", AlignConfig())


def align_dino_r50_24e() -> Recipe:
    """Align-DETR, 24 epochs."""
    about = "Align-DETR on DINO, ResNet-50, 24 epochs"
    return _aligned_dino("align-dino-r50-24e", about, AlignConfig(), epochs=24, drop=20)


def align_dino_r50_ia_bce() -> Recipe:
    """The setting whose code and weights were released:
    2 candidates and the first version's loss.
    """
    about = "Align-DETR's released setting: IA-BCE, k = 2"
    return _aligned_dino("align-dino-r50-ia-bce", about, AlignConfig(k=2, classification="ia_bce"))


def align_dab_detr_r50() -> Recipe:
    """Align-DETR on DAB-DETR, 50 epochs."""
    return _with(
        dab_detr_r50(),
        "align-dab-detr-r50",
        "Align-DETR on DAB-DETR, ResNet-50",
        align=AlignConfig(),
    )


def align_dab_detr_r50_dc5() -> Recipe:
    """Align-DETR on DAB-DETR with the dilated last stage, 50 epochs."""
    about = "Align-DETR on DAB-DETR, ResNet-50 with a dilated last stage"
    return _with(dab_detr_r50_dc5(), "align-dab-detr-r50-dc5", about, align=AlignConfig())


def align_dab_detr_r101_dc5() -> Recipe:
    """The same with a ResNet-101."""
    smaller = align_dab_detr_r50_dc5()
    backbone = smaller.detector.backbone.replace(name="resnet101")
    return smaller.model_copy(
        update={
            "name": "align-dab-detr-r101-dc5",
            "about": "Align-DETR on DAB-DETR, ResNet-101 with a dilated last stage",
            "detector": smaller.detector.replace(backbone=backbone),
        }
    )


def h_deformable_detr_r50() -> Recipe:
    """H-DETR, 12 epochs."""
    base = deformable_detr_r50_two_stage_plus()
    about = "H-DETR: Deformable DETR++ with hybrid matching, ResNet-50"
    return _with(base, "h-deformable-detr-r50", about, epochs=12, drop=11, hybrid=HybridConfig())


def align_h_deformable_detr_r50() -> Recipe:
    """H-DETR with the Align Loss in both branches, 12 epochs;
    only the second matches several queries to a target.
    """
    about = "Align-DETR on H-DETR, ResNet-50"
    return _with(
        h_deformable_detr_r50(), "align-h-deformable-detr-r50", about, align=AlignConfig(k=1)
    )


def stable_dino_r50() -> Recipe:
    """Stable-DINO: its loss, matching and memory fusion on DINO, 12 epochs."""
    base = _detrex_dino()
    fused = base.detector.replace(encoder=base.detector.encoder.replace(fusion=True))
    base = base.model_copy(update={"detector": fused})
    return _with(base, "stable-dino-r50", "Stable-DINO, ResNet-50, 4 scales", stable=StableConfig())


RECIPES: Recipes = {
    "align-dino-r50": align_dino_r50,
    "align-dino-r50-24e": align_dino_r50_24e,
    "align-dino-r50-ia-bce": align_dino_r50_ia_bce,
    "align-dab-detr-r50": align_dab_detr_r50,
    "align-dab-detr-r50-dc5": align_dab_detr_r50_dc5,
    "align-dab-detr-r101-dc5": align_dab_detr_r101_dc5,
    "h-deformable-detr-r50": h_deformable_detr_r50,
    "align-h-deformable-detr-r50": align_h_deformable_detr_r50,
    "stable-dino-r50": stable_dino_r50,
}
