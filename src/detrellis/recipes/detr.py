"""DETR (Carion et al., 2020)."""

from __future__ import annotations

from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.detector import (
    DecoderConfig,
    DenseAttentionConfig,
    DetectorConfig,
    LearnedQueriesConfig,
)
from detrellis.recipes.encoders import DenseEncoderConfig


def single_scale_detector(*, dilation: bool = False) -> DetectorConfig:
    """DETR's network with a ResNet-50:
    dense attention over one map of stride 32, or 16 with `dilation` (DC5).
    """
    return DetectorConfig(
        backbone=BackboneConfig(strides=(32,), dilation=dilation),
        encoder=DenseEncoderConfig(hidden=2048),
        queries=LearnedQueriesConfig(count=100, content="zero"),
        cross_attention=DenseAttentionConfig(),
        decoder=DecoderConfig(hidden=2048, final_norm=True),
        scores="softmax",
        position_offset=0.0,
        top_k=100,
    )


def _recipe(name: str, about: str, detector: DetectorConfig) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        detector=detector,
        loss=LossConfig(classes=1.0, cost_classes=1.0),
        optim=OptimConfig(lr=1e-4, batch_size=16),
        schedule=ScheduleConfig(epochs=300, drops=(2 / 3,)),
    )


def detr_r50() -> Recipe:
    """DETR, 300 epochs."""
    return _recipe("detr-r50", "DETR, ResNet-50", single_scale_detector())


def detr_r50_dc5() -> Recipe:
    """DETR on the dilated last stage, 300 epochs."""
    return _recipe(
        "detr-r50-dc5",
        "DETR, ResNet-50 with a dilated last stage",
        single_scale_detector(dilation=True),
    )


RECIPES: Recipes = {
    "detr-r50": detr_r50,
    "detr-r50-dc5": detr_r50_dc5,
}
