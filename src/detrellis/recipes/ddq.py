"""DDQ-DETR: DINO with distinct queries, and dense ones beside them in training."""

from __future__ import annotations

from detrellis.recipes.config import OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.dino import dino_r50
from detrellis.schemes.config import DenseConfig


def ddq_dino_r50() -> Recipe:
    """DDQ-DETR with 4 scales, 12 epochs. Its authors report AP 51.3."""
    base = dino_r50()
    detector = base.detector.replace(
        queries=base.detector.queries.replace(content_from="memory", distinct=0.8),
        decoder=base.detector.decoder.replace(shared_heads=False, distinct=0.8),
    )
    return base.model_copy(
        update={
            "name": "ddq-dino-r50",
            "about": "DDQ-DETR: DINO with distinct queries, ResNet-50, 4 scales",
            "detector": detector,
            "schemes": base.schemes.model_copy(update={"dense": DenseConfig()}),
            "optim": OptimConfig(
                lr=2e-4, weight_decay=0.05, scaled={"backbone": 0.1}, batch_size=16
            ),
            "schedule": ScheduleConfig(epochs=12, drops=(11 / 12,), warmup_steps=2000),
        }
    )


RECIPES: Recipes = {"ddq-dino-r50": ddq_dino_r50}
