"""DINO (Zhang et al., 2023): mixed query selection, contrastive denoising, look forward twice."""

from __future__ import annotations

from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.data import DataConfig
from detrellis.recipes.deformable import SWIN_L
from detrellis.recipes.detector import DecoderConfig, DetectorConfig, MixedQueriesConfig
from detrellis.recipes.encoders import DeformableEncoderConfig
from detrellis.recipes.scale import of_few_steps, small_sized, tiny_sized
from detrellis.schemes.config import CDNConfig, SchemesConfig


def dino_detector(*, strides: tuple[int, ...] = (8, 16, 32), levels: int = 4) -> DetectorConfig:
    """DINO's network with a ResNet-50."""
    return DetectorConfig(
        backbone=BackboneConfig(strides=strides),
        encoder=DeformableEncoderConfig(hidden=2048, levels=levels),
        queries=MixedQueriesConfig(count=900, position="boxes", proposal_targets="classes"),
        decoder=DecoderConfig(
            hidden=2048, refine="look_forward_twice", final_norm=True, shared_heads=True
        ),
        dropout=0.0,
        eps=1e-3,
        position_temperature=20.0,
        position_offset=0.0,
        top_k=300,
    )


def _recipe(name: str, about: str, detector: DetectorConfig) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        detector=detector,
        loss=LossConfig(classes=1.0),
        schemes=SchemesConfig(cdn=CDNConfig()),
        optim=OptimConfig(lr=1e-4, scaled={"backbone": 0.1}, batch_size=16),
        schedule=ScheduleConfig(epochs=12, drops=(11 / 12,)),
    )


def dino_r50() -> Recipe:
    """DINO with 4 scales, 12 epochs."""
    return _recipe("dino-r50", "DINO, ResNet-50, 4 scales", dino_detector())


def dino_r50_5scale() -> Recipe:
    """DINO with 5 scales, 12 epochs."""
    detector = dino_detector(strides=(4, 8, 16, 32), levels=5)
    return _recipe(
        "dino-r50-5scale", "DINO, ResNet-50, 5 scales (slower, better on small objects)", detector
    )


def dino_r50_lsj() -> Recipe:
    """DINO with 4 scales and ViTDet's large-scale jitter at 1024 pixels, 12 epochs."""
    recipe = _recipe(
        "dino-r50-lsj", "DINO, ResNet-50, 4 scales, large-scale jitter", dino_detector()
    )
    data = DataConfig(size=(1024, 1024), augment="lsj", lsj_style="detectron2", pad=128)
    return recipe.model_copy(update={"data": data})


def dino_swin_l() -> Recipe:
    """DINO with a Swin-L pretrained on ImageNet-22K, 4 scales, 36 epochs."""
    backbone = BackboneConfig(name=SWIN_L, drop_path=0.2)
    detector = dino_detector().replace(backbone=backbone)
    recipe = _recipe("dino-swin-l", "DINO, Swin-L, 4 scales", detector)
    return recipe.model_copy(update={"schedule": ScheduleConfig(epochs=36, drops=(30 / 36,))})


def tiny() -> Recipe:
    """A small DINO made for CPUs and small data sets, trained from scratch: `dino-r50 --scale tiny`,
    but made to converge in few steps.
    """
    about = "small DINO for CPUs and small data, from scratch"
    recipe = of_few_steps(tiny_sized(dino_r50()))
    return recipe.model_copy(update={"name": "tiny", "about": about})


def small() -> Recipe:
    """DINO at the cost of `tiny`, on ImageNet features:
    what to begin with on a few hundred pictures.
    """
    about = "small DINO for CPUs and small data, on ImageNet features"
    return small_sized(dino_r50()).model_copy(update={"name": "small", "about": about})


RECIPES: Recipes = {
    "dino-r50": dino_r50,
    "dino-r50-5scale": dino_r50_5scale,
    "dino-r50-lsj": dino_r50_lsj,
    "dino-swin-l": dino_swin_l,
}
