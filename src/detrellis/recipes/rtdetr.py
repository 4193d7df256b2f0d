"""RT-DETR (Zhao et al., CVPR 2024) and RT-DETRv2 (Lv et al., 2024):
real-time detectors on ResNet-vd.

RT-DETR is DINO with another encoder, contents from the proposals' states, positions from the boxes
themselves, and VFL. RT-DETRv2 samples alike unless it is told otherwise (`cross_attention.points`,
`sampling`), and is trained longer.

| deviation from the released code | why |
| --- | --- |
| each picture is resized to its batch's size; there the batch, to its nearest pixels | nothing to resize twice |
| tokens that can propose nothing come last; there they compete with the score of an empty memory | padding |
| backbones start from timm's weights, not Paddle's SSLD, said to be worth some tenths of an AP | they can be had |
"""

from __future__ import annotations

from typing import Any

from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.data import DataConfig
from detrellis.recipes.detector import (
    DecoderConfig,
    DeformableAttentionConfig,
    DetectorConfig,
    MixedQueriesConfig,
)
from detrellis.recipes.encoders import HybridEncoderConfig
from detrellis.recipes.scale import small_sized
from detrellis.schemes.config import CDNConfig, SchemesConfig

# Of each depth: decoder layers, the hybrid encoder, and the norms of its ResNet-vd.
LAYERS = {18: 3, 34: 4, 50: 6, 101: 6}
ENCODERS = {
    18: HybridEncoderConfig(expansion=0.5),
    34: HybridEncoderConfig(expansion=0.5),
    50: HybridEncoderConfig(),
    101: HybridEncoderConfig(inner=384, hidden=2048),
}
# Pixels stay between 0 and 1
UNIT: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
DATA = DataConfig(size=(640, 640), keep_aspect=False, augment="realtime", calm=0.0, **UNIT)


def rtdetr_detector(depth: int) -> DetectorConfig:
    """RT-DETR's network on a ResNet-vd of that depth; norms of the larger two are frozen."""
    return DetectorConfig(
        backbone=BackboneConfig(name=f"resnet{depth}vd", norm="frozen" if depth >= 50 else "batch"),
        encoder=ENCODERS[depth],
        queries=MixedQueriesConfig(
            content_from="states", position="boxes", proposal_targets="classes"
        ),
        cross_attention=DeformableAttentionConfig(position="box"),
        decoder=DecoderConfig(layers=LAYERS[depth], refine="look_forward_twice"),
        dropout=0.0,
        top_k=300,
    )


def _optim(backbone: float, **changes: Any) -> OptimConfig:
    scaled = {} if backbone == 1 else {"backbone": backbone}
    return OptimConfig(
        lr=1e-4, scaled=scaled, decay_norms=False, ema=0.9999, ema_ramp=2000, **changes
    )


def _recipe(
    name: str, about: str, depth: int, optim: OptimConfig, schedule: ScheduleConfig, **data: Any
) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        detector=rtdetr_detector(depth),
        loss=LossConfig(classification="vfl_detached", classes=1.0),
        schemes=SchemesConfig(cdn=CDNConfig()),
        optim=optim,
        schedule=schedule,
        data=DATA.replace(**data),
    )


def _rtdetr(depth: int, *, backbone: float) -> Recipe:
    """RT-DETR, 72 epochs; `backbone`: factor on its learning rate."""
    optim = _optim(backbone, undecayed=("bias",))
    schedule = ScheduleConfig(epochs=72, drops=())
    return _recipe(
        f"rtdetr-r{depth}", f"RT-DETR, ResNet-{depth}-vd, 640 pixels", depth, optim, schedule
    )


def _rtdetrv2(depth: int, *, backbone: float, epochs: int, calm: int, **data: Any) -> Recipe:
    """RT-DETRv2; `backbone`: factor on its learning rate;
    `calm`: last epochs without strong augmentation.
    """
    schedule = ScheduleConfig(epochs=epochs, drops=(), warmup_steps=2000)
    about = f"RT-DETRv2, ResNet-{depth}-vd, 640 pixels"
    return _recipe(
        f"rtdetrv2-r{depth}", about, depth, _optim(backbone), schedule, calm=calm / epochs, **data
    )


def rtdetr_r18() -> Recipe:
    """RT-DETR-R18: 3 decoder layers, half as wide fusions."""
    return _rtdetr(18, backbone=0.1)


def rtdetr_r34() -> Recipe:
    """RT-DETR-R34: 4 decoder layers, half as wide fusions."""
    return _rtdetr(34, backbone=0.1)


def rtdetr_r50() -> Recipe:
    """RT-DETR-R50."""
    return _rtdetr(50, backbone=0.1)


def rtdetr_r101() -> Recipe:
    """RT-DETR-R101: an encoder of width 384."""
    return _rtdetr(101, backbone=0.01)


def rtdetrv2_r18() -> Recipe:
    """RT-DETRv2-S, at one size."""
    return _rtdetrv2(18, backbone=1.0, epochs=120, calm=3, multi_scale=(1.0, 1.0))


def rtdetrv2_r34() -> Recipe:
    """RT-DETRv2-M*."""
    return _rtdetrv2(34, backbone=0.5, epochs=120, calm=3)


def rtdetrv2_r50() -> Recipe:
    """RT-DETRv2-L."""
    return _rtdetrv2(50, backbone=0.1, epochs=72, calm=1)


def rtdetrv2_r101() -> Recipe:
    """RT-DETRv2-X."""
    return _rtdetrv2(101, backbone=0.01, epochs=72, calm=1)


def small_rtdetr() -> Recipe:
    """RT-DETR at the cost of `tiny`, on ImageNet features."""
    about = "small RT-DETR for CPUs and small data, on ImageNet features"
    return small_sized(rtdetr_r18()).model_copy(update={"name": "small-rtdetr", "about": about})


RECIPES: Recipes = {
    "small-rtdetr": small_rtdetr,
    "rtdetr-r18": rtdetr_r18,
    "rtdetr-r34": rtdetr_r34,
    "rtdetr-r50": rtdetr_r50,
    "rtdetr-r101": rtdetr_r101,
    "rtdetrv2-r18": rtdetrv2_r18,
    "rtdetrv2-r34": rtdetrv2_r34,
    "rtdetrv2-r50": rtdetrv2_r50,
    "rtdetrv2-r101": rtdetrv2_r101,
}
