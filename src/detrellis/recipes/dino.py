"""DINO (Zhang et al., 2023): mixed query selection, contrastive denoising, look forward twice."""

from __future__ import annotations

from detrellis.recipes.config import (
    BackboneConfig,
    CDNConfig,
    DataConfig,
    DetectorConfig,
    LossConfig,
    OptimConfig,
    Recipe,
    ScheduleConfig,
    SchemesConfig,
)


def dino_detector(*, strides: tuple[int, ...] = (8, 16, 32), levels: int = 4) -> DetectorConfig:
    """DINO's network with a ResNet-50."""
    return DetectorConfig(
        backbone=BackboneConfig(strides=strides),
        levels=levels,
        hidden=2048,
        dropout=0.0,
        queries="mixed",
        query_count=900,
        query_position="boxes",
        refine="look_forward_twice",
        final_norm=True,
        shared_heads=True,
        eps=1e-3,
        position_temperature=20.0,
        position_offset=0.0,
        proposal_targets="classes",
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
    return _recipe("dino-r50-5scale", "DINO, ResNet-50, 5 scales (slower, better on small objects)", detector)


def tiny() -> Recipe:
    """A small DINO made for CPUs and small data sets, trained from scratch."""
    detector = dino_detector(strides=(8, 16), levels=3).model_copy(
        update={
            "backbone": BackboneConfig(name="resnet18", pretrained=False, strides=(8, 16)),
            "width": 128,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "hidden": 512,
            "query_count": 100,
            "top_k": 100,
        }
    )
    return Recipe(
        name="tiny",
        about="small DINO for CPUs and small data, from scratch",
        detector=detector,
        # From scratch the classes are what is learned last: twice DINO's weight, which is Deformable DETR's.
        loss=LossConfig(classes=2.0),
        schemes=SchemesConfig(cdn=CDNConfig()),
        optim=OptimConfig(lr=4e-4, scaled={}, batch_size=8, clip=0.1, ema=0.999),
        schedule=ScheduleConfig(epochs=40, warmup=0.03, shape="cosine", final=0.02),
        data=DataConfig(size=(192, 256), augment="fixed"),
    )
