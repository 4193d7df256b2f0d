"""Deformable DETR (Zhu et al., 2021): one-stage, with iterative box refinement, and two-stage."""

from __future__ import annotations

from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.detector import (
    DecoderConfig,
    DetectorConfig,
    MixedQueriesConfig,
    ProposalQueriesConfig,
)
from detrellis.recipes.encoders import DeformableEncoderConfig

SWIN_L = "swin_large_patch4_window12_384.ms_in22k"
OPTIM = OptimConfig(lr=2e-4, scaled={"backbone": 0.1, "sampling_offsets": 0.1}, batch_size=16)
# Where queries are learned, what reads their reference points is as careful as the offsets.
POINTS = OPTIM.model_copy(update={"scaled": {**OPTIM.scaled, "queries.reference": 0.1}})


def _recipe(name: str, about: str, detector: DetectorConfig) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        detector=detector,
        loss=LossConfig(classes=2.0),
        optim=POINTS if detector.queries.kind == "learned" else OPTIM,
        schedule=ScheduleConfig(epochs=50, drops=(0.8,)),
    )


def deformable_detr_r50() -> Recipe:
    """One-stage: 300 learned queries with fixed reference points."""
    return _recipe(
        "deformable-detr-r50", "Deformable DETR, one-stage, ResNet-50, 4 scales", DetectorConfig()
    )


def deformable_detr_r50_refine() -> Recipe:
    """With iterative box refinement."""
    detector = DetectorConfig(decoder=DecoderConfig(refine="detached"))
    return _recipe(
        "deformable-detr-r50-refine", "Deformable DETR with iterative box refinement", detector
    )


def deformable_detr_r50_two_stage() -> Recipe:
    """Two-stage with iterative box refinement: queries from the encoder's best proposals."""
    detector = DetectorConfig(
        queries=ProposalQueriesConfig(), decoder=DecoderConfig(refine="detached")
    )
    return _recipe(
        "deformable-detr-r50-two-stage", "Deformable DETR, two-stage with box refinement", detector
    )


def deformable_detr_r50_two_stage_plus() -> Recipe:
    """The "++" tricks, H-DETR's base:
    no dropout, mixed query selection, look forward twice, FFN 2048.
    """
    detector = DetectorConfig(
        encoder=DeformableEncoderConfig(hidden=2048),
        queries=MixedQueriesConfig(),
        decoder=DecoderConfig(hidden=2048, refine="look_forward_twice"),
        dropout=0.0,
    )
    return _recipe(
        "deformable-detr-r50-two-stage-plus", "Deformable DETR++, H-DETR's base", detector
    )


def deformable_detr_swin_l() -> Recipe:
    """ "++" with a Swin-L pretrained on ImageNet-22K, 12 epochs:
    H-DETR's and Co-DETR's strong baseline.
    """
    plus = deformable_detr_r50_two_stage_plus()
    backbone = BackboneConfig(name=SWIN_L, drop_path=0.5)
    return plus.model_copy(
        update={
            "name": "deformable-detr-swin-l",
            "about": "Deformable DETR++, Swin-L, 4 scales",
            "detector": plus.detector.replace(backbone=backbone),
            "optim": OPTIM.model_copy(update={"weight_decay": 0.05}),
            "schedule": ScheduleConfig(epochs=12, drops=(11 / 12,)),
        }
    )


RECIPES: Recipes = {
    "deformable-detr-r50": deformable_detr_r50,
    "deformable-detr-r50-refine": deformable_detr_r50_refine,
    "deformable-detr-r50-two-stage": deformable_detr_r50_two_stage,
    "deformable-detr-r50-two-stage-plus": deformable_detr_r50_two_stage_plus,
    "deformable-detr-swin-l": deformable_detr_swin_l,
}
