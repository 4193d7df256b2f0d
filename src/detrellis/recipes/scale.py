"""Any recipe at a size for CPUs and small data sets, trained from scratch:
the same network parts and schemes, less of each."""

from __future__ import annotations

from detrellis.recipes.backbones import (
    VD_RESNETS,
    AnyBackboneConfig,
    BackboneConfig,
    EvaViTConfig,
    TimmViTConfig,
    WindowViTConfig,
)
from detrellis.recipes.config import OptimConfig, Recipe, ScheduleConfig
from detrellis.recipes.data import DataConfig
from detrellis.recipes.detector import CrossAttentionConfig, DetectorConfig
from detrellis.recipes.encoders import EncoderConfig

# Of few steps: Mask2Former's weights, 5, leave classes behind (docs/experiments/masks.md).
MASK_LOSSES = {"mask": 1.0, "dice": 1.0, "points": 256}
# Class losses in which a negative counts 0.75 p^2; others weigh classes more by themselves.
LIGHT_LOSSES = ("focal", "vfl", "vfl_detached")


def tiny_sized(recipe: Recipe) -> Recipe:
    """A ResNet-18 without its last stage, 2 encoder and 3 decoder layers of width 128, 256x192
    pixels, 40 epochs; of hybrid encoders, 1 layer; of plain ViTs, 6 blocks of width 192 (timm's:
    12)."""
    detector, loss = recipe.detector, recipe.loss
    dense = detector.encoder.kind == "dense"
    masks = None if detector.masks is None else detector.masks.replace(width=128)
    queries = detector.queries.replace(count=100)
    if queries.boxes_from_masks is not None:
        # Until masks are learned, boxes around them lead astray: docs/experiments/masks.md.
        queries = queries.replace(boxes_from_masks=None)
    # Of small pictures a part of a cell is much: docs/experiments/small.md
    small = _parts(detector).replace(
        width=128, queries=queries, top_k=100, masks=masks, size_divisor=32
    )
    # In few steps the classes are what is learned last, so of such a loss they get at least
    # Deformable DETR's weight: docs/experiments/quality.md
    light = detector.scores == "sigmoid" and loss.classification in LIGHT_LOSSES
    classes = max(loss.classes, 2.0) if light else loss.classes
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-tiny",
            "about": f"{recipe.about}; at a size for CPUs and small data, from scratch",
            "detector": small,
            "loss": loss.model_copy(
                update={"classes": classes} | ({} if masks is None else MASK_LOSSES)
            ),
            # Ten times the papers' rate, up for half of the run: docs/experiments/rate.md. Dense
            # attention learns at theirs, hardly at four times of it: docs/experiments/sam-detr.md.
            "optim": OptimConfig(lr=1e-4 if dense else 1e-3, scaled={}, batch_size=8, ema=0.999),
            "schedule": ScheduleConfig(
                epochs=40, warmup=0.03, shape="cosine", flat=0.0 if dense else 0.5, final=0.02
            ),
            "data": DataConfig(
                size=(192, 256), match_orientation=True, augment="fixed", group_by_aspect=True
            ),
        }
    )


def small_sized(recipe: Recipe) -> Recipe:
    """The same of a two-stage detector on three levels, but on an EfficientNet-Lite0 with ImageNet
    weights, which a package holds, so that nothing is downloaded; it learns as `of_few_steps` says.

    The features are trained as all else is, BatchNorm too, at the full rate:
    docs/experiments/small.md.
    """
    tiny = of_few_steps(tiny_sized(recipe))
    detector = tiny.detector.replace(
        backbone=BackboneConfig(name="tf_efficientnet_lite0", norm="batch"),
        encoder=tiny.detector.encoder.replace(levels=3),
    )
    return tiny.model_copy(update={"detector": detector})


def of_few_steps(recipe: Recipe) -> Recipe:
    """A two-stage detector made to converge in few steps: with distinct queries, whose contents are
    the states that propose them, and classes that learn the quality of their boxes (VFL).

    What each of these brings: docs/experiments/distinct.md and docs/experiments/quality.md.
    """
    detector = recipe.detector
    queries = detector.queries.replace(content_from="states", distinct=0.7)
    decoder = detector.decoder.replace(distinct=0.7)
    return recipe.model_copy(
        update={
            "detector": detector.replace(queries=queries, decoder=decoder),
            "loss": recipe.loss.replace(classification="vfl"),
        }
    )


def _parts(detector: DetectorConfig) -> DetectorConfig:
    """The detector with a small backbone, encoder and decoder."""
    decoder = detector.decoder.replace(layers=3, hidden=512)
    if isinstance(detector.backbone, WindowViTConfig):
        sizes = {
            "width": 192,
            "heads": 6,
            "grid": 16,
            "windows": 2,
            "windowed": (0, 2, 4),
            "taps": (2, 4, 6),
        }
        backbone = detector.backbone.untrained().replace(**sizes, drop_path=0.0)
        return detector.replace(backbone=backbone, decoder=decoder.replace(heads=8, cross_heads=16))
    return detector.replace(
        backbone=_tiny_backbone(
            detector.backbone, (16,) if detector.encoder.kind == "dense" else (8, 16)
        ),
        encoder=_tiny_encoder(detector.encoder),
        cross_attention=_tiny_attention(detector.cross_attention),
        decoder=decoder,
    )


def _tiny_backbone(backbone: AnyBackboneConfig, strides: tuple[int, ...]) -> AnyBackboneConfig:
    """A ResNet-18 or ResNet-18-vd; of plain ViTs with a pyramid one of width 192."""
    light = {"pretrained": False, "weights": None, "strides": strides, "drop_path": 0.0}
    if isinstance(backbone, EvaViTConfig):
        sizes = {
            "width": 192,
            "depth": 6,
            "heads": 6,
            "window": 4,
            "global_blocks": (2, 5),
            "grid": 16,
            "extent": None,
        }
        return backbone.replace(**light, **sizes, checkpointing=False, frozen=0)
    if isinstance(backbone, TimmViTConfig):
        return backbone.replace(**light, name="vit_tiny_patch16_224", checkpointing=False, frozen=0)
    assert isinstance(backbone, BackboneConfig)
    name = VD_RESNETS[0] if backbone.name in VD_RESNETS else "resnet18"
    return BackboneConfig(name=name, pretrained=False, strides=strides)


def _tiny_encoder(encoder: EncoderConfig) -> EncoderConfig:
    """Two layers on one map, or on three levels;
    a hybrid one attends within the coarser of its two maps.
    """
    if encoder.kind == "hybrid":
        return encoder.replace(layers=1, hidden=512, levels=2, inner=None, expansion=0.5)
    others = {} if encoder.kind == "dense" else {"levels": 3}
    return encoder.replace(layers=2, hidden=512, **others)


def _tiny_attention(attention: CrossAttentionConfig) -> CrossAttentionConfig:
    """Points by level: those of the two coarser ones."""
    if attention.kind != "deformable" or isinstance(attention.points, int):
        return attention
    return attention.replace(points=attention.points[-2:])
