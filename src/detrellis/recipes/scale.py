"""Any recipe at a size for CPUs and small data sets, trained from scratch: the same network parts and schemes, less of
each."""

from __future__ import annotations

from detrellis.recipes.config import DataConfig, OptimConfig, Recipe, ScheduleConfig
from detrellis.recipes.detector import VD_RESNETS, BackboneConfig, CrossAttentionConfig, DetectorConfig, EncoderConfig


def tiny_sized(recipe: Recipe) -> Recipe:
    """A ResNet-18 without its last stage, 2 encoder and 3 decoder layers of width 128, 256x192 pixels, 40 epochs; of
    hybrid encoders, 1 layer."""
    detector = recipe.detector
    dense = detector.encoder.kind == "dense"
    small = detector.replace(
        backbone=BackboneConfig(name=_depth_18(detector), pretrained=False, strides=(16,) if dense else (8, 16)),
        width=128,
        encoder=_tiny_encoder(detector.encoder),
        cross_attention=_tiny_attention(detector.cross_attention),
        queries=detector.queries.replace(count=100),
        decoder=detector.decoder.replace(layers=3, hidden=512),
        top_k=100,
        masks=None if detector.masks is None else detector.masks.replace(width=128),
    )
    # From scratch the classes are what is learned last: at least Deformable DETR's weight, where the loss is focal.
    classes = max(recipe.loss.classes, 2.0) if detector.scores == "sigmoid" else recipe.loss.classes
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-tiny",
            "about": f"{recipe.about}; at a size for CPUs and small data, from scratch",
            "detector": small,
            "loss": recipe.loss.model_copy(update={"classes": classes}),
            # Dense attention learns at the papers' rate, hardly at four times of it: docs/experiments/sam-detr.md.
            "optim": OptimConfig(lr=1e-4 if dense else 4e-4, scaled={}, batch_size=8, ema=0.999),
            "schedule": ScheduleConfig(epochs=40, warmup=0.03, shape="cosine", final=0.02),
            "data": DataConfig(size=(192, 256), match_orientation=True, augment="fixed", group_by_aspect=True),
        }
    )


def _tiny_encoder(encoder: EncoderConfig) -> EncoderConfig:
    """Two layers on one map, or on three levels; a hybrid one attends within the coarser of its two maps."""
    if encoder.kind == "hybrid":
        return encoder.replace(layers=1, hidden=512, levels=2, inner=None, expansion=0.5)
    levels = {} if encoder.kind == "dense" else {"levels": 3}
    return encoder.replace(layers=2, hidden=512, **levels)


def _tiny_attention(attention: CrossAttentionConfig) -> CrossAttentionConfig:
    """Points by level: those of the two coarser ones."""
    if attention.kind != "deformable" or isinstance(attention.points, int):
        return attention
    return attention.replace(points=attention.points[-2:])


def _depth_18(detector: DetectorConfig) -> str:
    return VD_RESNETS[0] if detector.backbone.name in VD_RESNETS else "resnet18"
