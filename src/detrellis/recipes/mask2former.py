"""Mask2Former (Cheng et al., CVPR 2022) for instance segmentation, and Group DETR on it."""

from __future__ import annotations

from functools import partial

from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.data import DataConfig
from detrellis.recipes.detector import (
    DecoderConfig,
    DetectorConfig,
    LearnedQueriesConfig,
    MaskedAttentionConfig,
    MasksConfig,
)
from detrellis.recipes.encoders import DeformableEncoderConfig
from detrellis.schemes.config import GroupConfig, SchemesConfig

SWINS = {
    "t": "swin_tiny_patch4_window7_224.ms_in1k",
    "s": "swin_small_patch4_window7_224.ms_in1k",
    "b": "swin_base_patch4_window12_384.ms_in22k",
    "l": "swin_large_patch4_window12_384.ms_in22k",
}
DROPS = (0.8889, 0.963)  # of the run, at any length


def mask2former_detector(backbone: BackboneConfig, queries: int = 100) -> DetectorConfig:
    """Mask2Former's network on a backbone."""
    return DetectorConfig(
        backbone=backbone,
        encoder=DeformableEncoderConfig(levels=3),
        queries=LearnedQueriesConfig(count=queries),
        cross_attention=MaskedAttentionConfig(),
        decoder=DecoderConfig(layers=9, hidden=2048, final_norm=True, shared_heads=True),
        masks=MasksConfig(),
        dropout=0.0,
        scores="softmax",
        position_offset=0.0,
        top_k=100,
    )


def _recipe(name: str, about: str, detector: DetectorConfig, epochs: int = 50) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        detector=detector,
        loss=LossConfig(),
        optim=OptimConfig(
            lr=1e-4,
            weight_decay=0.05,
            scaled={"backbone": 0.1},
            decay_norms=False,
            undecayed=("queries.", "table.", "decoder.level_embed", "relative_position_bias_table"),
            clip=0.01,
            batch_size=16,
        ),
        schedule=ScheduleConfig(epochs=epochs, drops=DROPS),
        # Large-scale jitter: a size from a tenth to twice of it, on a canvas of one size.
        data=DataConfig(size=(1024, 1024), augment="fixed", jitter=0.0, zoom=(0.1, 2.0)),
    )


def _resnet(name: str) -> BackboneConfig:
    return BackboneConfig(name=name, norm="frozen_norm")


def mask2former_r50() -> Recipe:
    """ResNet-50, 50 epochs."""
    return _recipe(
        "mask2former-r50",
        "Mask2Former, ResNet-50, 50 epochs",
        mask2former_detector(_resnet("resnet50")),
    )


def mask2former_r50_12e() -> Recipe:
    """The base of Group DETR's row; its paper gives no schedule, so that this one is ours."""
    detector = mask2former_detector(_resnet("resnet50"))
    return _recipe(
        "mask2former-r50-12e",
        "Mask2Former, ResNet-50, 12 epochs (schedule ours)",
        detector,
        epochs=12,
    )


def mask2former_r101() -> Recipe:
    """ResNet-101, 50 epochs."""
    detector = mask2former_detector(_resnet("resnet101"))
    return _recipe("mask2former-r101", "Mask2Former, ResNet-101, 50 epochs", detector)


def _swin(size: str) -> Recipe:
    large = size == "l"
    backbone = BackboneConfig(name=SWINS[size], drop_path=0.3)
    detector = mask2former_detector(backbone, queries=200 if large else 100)
    epochs = 100 if large else 50
    about = f"Mask2Former, Swin-{size.upper()}, {epochs} epochs"
    return _recipe(f"mask2former-swin-{size}", about, detector, epochs)


def group_mask2former_r50() -> Recipe:
    """Group DETR, Table 3. The paper gives neither the number of groups nor the schedule:
    both are ours.
    """
    base = mask2former_r50_12e()
    return base.model_copy(
        update={
            "name": "group-mask2former-r50",
            "about": (
                "Group DETR, 11 groups, on Mask2Former, ResNet-50, 12 epochs (groups and "
                "schedule ours)"
            ),
            "schemes": SchemesConfig(group=GroupConfig(k=11)),
        }
    )


RECIPES: Recipes = {
    "mask2former-r50": mask2former_r50,
    "mask2former-r50-12e": mask2former_r50_12e,
    "mask2former-r101": mask2former_r101,
    **{f"mask2former-swin-{size}": partial(_swin, size) for size in SWINS},
    "group-mask2former-r50": group_mask2former_r50,
}
