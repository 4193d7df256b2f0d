"""Conditional DETR (Meng et al., 2021)."""

from __future__ import annotations

from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.detector import ConditionalAttentionConfig, DetectorConfig
from detrellis.recipes.detr import single_scale_detector


def conditional_detector(*, dilation: bool = False) -> DetectorConfig:
    """DETR's network with conditional attention, points as references and sigmoid scores."""
    detector = single_scale_detector(dilation=dilation)
    return detector.replace(
        queries=detector.queries.replace(count=300),
        cross_attention=ConditionalAttentionConfig(),
        scores="sigmoid",
    )


def _recipe(name: str, about: str, detector: DetectorConfig) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        detector=detector,
        loss=LossConfig(classes=2.0),
        optim=OptimConfig(lr=1e-4, batch_size=16),
        schedule=ScheduleConfig(epochs=50, drops=(0.8,)),
    )


def conditional_detr_r50() -> Recipe:
    """Conditional DETR, 50 epochs."""
    return _recipe("conditional-detr-r50", "Conditional DETR, ResNet-50", conditional_detector())


def conditional_detr_r50_dc5() -> Recipe:
    """Conditional DETR on the dilated last stage, 50 epochs."""
    about = "Conditional DETR, ResNet-50 with a dilated last stage"
    return _recipe("conditional-detr-r50-dc5", about, conditional_detector(dilation=True))


RECIPES: Recipes = {
    "conditional-detr-r50": conditional_detr_r50,
    "conditional-detr-r50-dc5": conditional_detr_r50_dc5,
}
