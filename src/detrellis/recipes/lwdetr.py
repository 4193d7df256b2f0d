"""LW-DETR (Chen et al., 2024) and RF-DETR (Robinson et al., 2025): a plain ViT with windows, a
projector instead of an encoder, and a shallow decoder, trained as Group DETR with 13 groups and
IA-BCE.

| deviation from the released codes | why |
| --- | --- |
| the decay of LW-DETR's averaged weights begins lower than .9997 | a random start is forgotten |
| LW-DETR's sizes, too, are those of batches, in steps of 32 pixels; there of pictures, in steps of 64 | no padding |
| the recipe's own size is drawn three times as often as each other one | one rule for all recipes |
"""

from __future__ import annotations

from typing import Any

from detrellis.recipes.backbones import WindowViTConfig
from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.data import DataConfig
from detrellis.recipes.detector import (
    DecoderConfig,
    DeformableAttentionConfig,
    DetectorConfig,
    MixedQueriesConfig,
)
from detrellis.recipes.encoders import ProjectorEncoderConfig
from detrellis.schemes.config import GroupConfig, SchemesConfig

DINOV2_SMALL = "vit_small_patch14_dinov2.lvd142m"
# What of the ViT goes without weight decay: in RF-DETR the whole embedding, but not LayerScale,
# whose name ("lambda1") its rule for "gamma" does not see.
BLOCKS = (
    *("attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"),
    *(".norm1.", ".norm2."),
)
LW_UNDECAYED = (*BLOCKS, ".gamma", "embedding.positions", "embedding.projection.bias")
RF_UNDECAYED = (*BLOCKS, "backbone.embedding.", "backbone.norm.")
LW_OPTIM = OptimConfig(lr=1e-4, ema=0.9997, undecayed=LW_UNDECAYED)
RF_OPTIM = OptimConfig(lr=1e-4, ema=0.993, ema_ramp=100, undecayed=RF_UNDECAYED)
# Of LW-DETR's ten blocks
DEEP: dict[str, Any] = {"windowed": (0, 1, 3, 6, 7, 9), "taps": (3, 5, 6, 10)}


def _detector(
    backbone: WindowViTConfig,
    *,
    queries: int = 300,
    layers: int = 3,
    large: bool = False,
    projector: ProjectorEncoderConfig | None = None,
) -> DetectorConfig:
    """The network on a backbone; `large`: with a wider decoder that reads two levels."""
    return DetectorConfig(
        backbone=backbone,
        width=384 if large else 256,
        encoder=projector or ProjectorEncoderConfig(strides=(8, 32) if large else (16,)),
        queries=MixedQueriesConfig(
            count=queries, position="boxes", proposal_targets="classes", deltas=True
        ),
        cross_attention=DeformableAttentionConfig(points=4 if large else 2),
        decoder=DecoderConfig(
            layers=layers,
            heads=12 if large else 8,
            cross_heads=24 if large else 16,
            hidden=2048,
            final_norm=True,
            shared_heads=True,
        ),
        dropout=0.0,
        box_encoding="relative",
        top_k=queries,
    )


def _recipe(
    name: str,
    about: str,
    detector: DetectorConfig,
    *,
    layer_decay: float = 0.8,
    component_decay: float = 0.7,
    batch_size: int = 16,
    size: int = 640,
    sizes: tuple[int, int] = (448, 896),
    epochs: int = 60,
    optim: OptimConfig = LW_OPTIM,
) -> Recipe:
    """Group DETR's 13 groups with IA-BCE, at LW-DETR's rates; sizes of batches lie between `sizes`.

    The rate of each part is `component_decay` times that of the part behind it, from the proposals
    and heads to the decoder to the ViT, whose blocks learn the slower the earlier they are; the
    ViT's own starts at 1.5 times.
    """
    scaled = {
        "backbone": 1.5 * component_decay**2,
        "decoder.heads": 1.0,
        "decoder.": component_decay,
    }
    return Recipe(
        name=name,
        about=about,
        detector=detector,
        loss=LossConfig(classification="ia_bce", classes=1.0),
        schemes=SchemesConfig(group=GroupConfig(k=13)),
        optim=optim.replace(scaled=scaled, layer_decay=layer_decay, batch_size=batch_size),
        schedule=ScheduleConfig(epochs=epochs, drops=()),
        data=DataConfig(
            size=(size, size),
            keep_aspect=False,
            augment="fixed",
            jitter=0.0,
            zoom=(1.0, 1.0),
            detr_crop=0.5,
            multi_scale=(sizes[0] / size, sizes[1] / size),
            calm=0.0,
        ),
    )


def lwdetr_tiny() -> Recipe:
    """A ViT of width 192 with 6 blocks, 100 queries. Its authors report AP 42.6."""
    detector = _detector(WindowViTConfig(), queries=100)
    return _recipe("lwdetr-tiny", "LW-DETR, 6 blocks of width 192", detector, batch_size=32)


def lwdetr_small() -> Recipe:
    """Width 192, 10 blocks. Its authors report AP 48.0."""
    detector = _detector(WindowViTConfig(**DEEP))
    return _recipe("lwdetr-small", "LW-DETR, 10 blocks of width 192", detector, batch_size=32)


def lwdetr_medium() -> Recipe:
    """Width 384, 10 blocks. Its authors report AP 52.5."""
    detector = _detector(WindowViTConfig(width=384, **DEEP))
    return _recipe("lwdetr-medium", "LW-DETR, 10 blocks of width 384", detector, layer_decay=0.7)


def lwdetr_large() -> Recipe:
    """Width 384, 10 blocks, with levels of strides 8 and 32. Its authors report AP 56.1."""
    detector = _detector(WindowViTConfig(width=384, drop_path=0.1, **DEEP), large=True)
    about = "LW-DETR, 10 blocks of width 384, 2 levels"
    return _recipe("lwdetr-large", about, detector, layer_decay=0.7, component_decay=0.5)


def _rfdetr(name: str, layers: int, size: int) -> Recipe:
    """RF-DETR on a DINOv2-S with patches of 16 pixels, at its fine-tuning's schedule."""
    backbone = WindowViTConfig(
        timm=DINOV2_SMALL,
        style="dinov2",
        width=384,
        heads=6,
        grid=size // 16,
        windows=2,
        windowed=(0, 1, 2, 4, 5, 7, 8, 10, 11),
        taps=(3, 6, 9, 12),
    )
    projector = ProjectorEncoderConfig(norm="layer")
    about = f"RF-DETR, DINOv2-S, {layers} decoder layers, {size} pixels"
    detector = _detector(backbone, layers=layers, projector=projector)
    sizes = (size - 160, size + 160)  # five windows less and more
    return _recipe(name, about, detector, size=size, sizes=sizes, epochs=100, optim=RF_OPTIM)


def rfdetr_nano() -> Recipe:
    """2 decoder layers at 384 pixels. Its authors report AP 48.4."""
    return _rfdetr("rfdetr-nano", 2, 384)


def rfdetr_small() -> Recipe:
    """3 decoder layers at 512 pixels. Its authors report AP 53.0."""
    return _rfdetr("rfdetr-small", 3, 512)


def rfdetr_medium() -> Recipe:
    """4 decoder layers at 576 pixels. Its authors report AP 54.7."""
    return _rfdetr("rfdetr-medium", 4, 576)


RECIPES: Recipes = {
    "lwdetr-tiny": lwdetr_tiny,
    "lwdetr-small": lwdetr_small,
    "lwdetr-medium": lwdetr_medium,
    "lwdetr-large": lwdetr_large,
    "rfdetr-nano": rfdetr_nano,
    "rfdetr-small": rfdetr_small,
    "rfdetr-medium": rfdetr_medium,
}
