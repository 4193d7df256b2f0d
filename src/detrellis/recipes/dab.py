"""DAB-DETR (Liu et al., 2022), DN-DETR (Li et al., 2022), and both on Deformable DETR's network."""

from __future__ import annotations

from typing import Literal

from detrellis.recipes.conditional import conditional_detector
from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.detector import (
    AnchorQueriesConfig,
    DecoderConfig,
    DeformableAttentionConfig,
    DetectorConfig,
)
from detrellis.recipes.encoders import DeformableEncoderConfig, DenseEncoderConfig
from detrellis.schemes.config import DNConfig, SchemesConfig

# The settings that DAB-DETR and its descendants share.
COMMON = {
    "dropout": 0.0,
    "eps": 1e-3,
    "position_temperature": 20.0,
    "position_offset": 0.0,
    "top_k": 300,
}


def dab_detector(*, dilation: bool = False) -> DetectorConfig:
    """Conditional DETR's network with anchor boxes as queries, refined at each layer."""
    detector = conditional_detector(dilation=dilation)
    return detector.replace(
        encoder=DenseEncoderConfig(hidden=2048, position_scale=True),
        queries=AnchorQueriesConfig(content="zero"),
        decoder=detector.decoder.replace(refine="look_forward_twice", shared_heads=True),
        activation="prelu",
        **COMMON,
    )


def dab_deformable_detector() -> DetectorConfig:
    """Deformable DETR's network with box refinement and anchor boxes as queries."""
    return DetectorConfig(
        encoder=DeformableEncoderConfig(hidden=2048),
        queries=AnchorQueriesConfig(content="learned"),
        cross_attention=DeformableAttentionConfig(position_scale=True),
        decoder=DecoderConfig(hidden=2048, refine="detached"),
    ).replace(**COMMON)


def with_indicator(
    detector: DetectorConfig, content: Literal["shared", "learned"]
) -> DetectorConfig:
    """DN-DETR's contents: one channel tells denoising queries from the others."""
    return detector.replace(queries=detector.queries.replace(content=content, indicator=True))


def _recipe(name: str, about: str, detector: DetectorConfig, dn: DNConfig | None = None) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        detector=detector,
        loss=LossConfig(classes=1.0),
        schemes=SchemesConfig(dn=dn),
        optim=OptimConfig(lr=1e-4, batch_size=16),
        schedule=ScheduleConfig(epochs=50, drops=(0.8,)),
    )


def dab_detr_r50() -> Recipe:
    """DAB-DETR, 50 epochs."""
    return _recipe("dab-detr-r50", "DAB-DETR, ResNet-50", dab_detector())


def dab_detr_r50_dc5() -> Recipe:
    """DAB-DETR on the dilated last stage, 50 epochs."""
    return _recipe(
        "dab-detr-r50-dc5",
        "DAB-DETR, ResNet-50 with a dilated last stage",
        dab_detector(dilation=True),
    )


def dn_detr_r50() -> Recipe:
    """DN-DETR, 50 epochs."""
    return _recipe(
        "dn-detr-r50", "DN-DETR, ResNet-50", with_indicator(dab_detector(), "shared"), DNConfig()
    )


def dn_detr_r50_dc5() -> Recipe:
    """DN-DETR on the dilated last stage, 50 epochs."""
    detector = with_indicator(dab_detector(dilation=True), "shared")
    return _recipe(
        "dn-detr-r50-dc5", "DN-DETR, ResNet-50 with a dilated last stage", detector, DNConfig()
    )


def dab_deformable_detr_r50() -> Recipe:
    """DAB-Deformable-DETR, 50 epochs."""
    return _recipe(
        "dab-deformable-detr-r50",
        "DAB-Deformable-DETR, ResNet-50, 4 scales",
        dab_deformable_detector(),
    )


def dn_deformable_detr_r50() -> Recipe:
    """DN-Deformable-DETR, 50 epochs."""
    detector = with_indicator(dab_deformable_detector(), "learned")
    about = "DN-Deformable-DETR, ResNet-50, 4 scales"
    return _recipe("dn-deformable-detr-r50", about, detector, DNConfig())


RECIPES: Recipes = {
    "dab-detr-r50": dab_detr_r50,
    "dab-detr-r50-dc5": dab_detr_r50_dc5,
    "dn-detr-r50": dn_detr_r50,
    "dn-detr-r50-dc5": dn_detr_r50_dc5,
}
DEFORMABLE_RECIPES: Recipes = {
    "dab-deformable-detr-r50": dab_deformable_detr_r50,
    "dn-deformable-detr-r50": dn_deformable_detr_r50,
}
