"""D-FINE (Peng et al., ICLR 2025): RT-DETR whose boxes are means of distributions, on a HGNetV2.

Its last layer teaches the others (DDF), and boxes learn by the union of all layers' matches
(GO-LSD); neither exists at inference.

| deviation from the released code | why |
| --- | --- |
| the average of weights goes on where strong augmentation ends; there it starts anew | one rule for a run |
| each picture is resized to its batch's size; there the batch, to its nearest pixels | nothing to resize twice |
| sizes of batches are equally frequent; there 640 pixels are 3 to 20 times as frequent | one rule for all |
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.detector import (
    DecoderConfig,
    DeformableAttentionConfig,
    DetectorConfig,
    DistributionsConfig,
    MixedQueriesConfig,
)
from detrellis.recipes.encoders import HybridEncoderConfig
from detrellis.recipes.rtdetr import DATA
from detrellis.schemes.config import CDNConfig, SchemesConfig

Size = Literal["n", "s", "m", "l", "x"]


class Network(NamedTuple):
    """What differs between the sizes of the network."""

    backbone: str  # a HGNetV2
    encoder: HybridEncoderConfig
    layers: int  # of the decoder
    scale: float = 4.0  # of the distributions
    width: int = 256
    hidden: int = 1024
    strides: tuple[int, ...] = (8, 16, 32)
    points: tuple[int, ...] = (3, 6, 3)


def _encoder(expansion: float, blocks: int, **changes: Any) -> HybridEncoderConfig:
    return HybridEncoderConfig(fuse_by="elan", expansion=expansion, blocks=blocks, **changes)


NETWORKS: dict[Size, Network] = {
    "n": Network(
        *("b0", _encoder(0.34, 2, levels=2, hidden=512), 3),
        width=128,
        hidden=512,
        strides=(16, 32),
        points=(6, 6),
    ),
    "s": Network("b0", _encoder(0.5, 1), 3),
    "m": Network("b2", _encoder(1.0, 2), 4),
    "l": Network("b4", _encoder(1.0, 3), 6),
    "x": Network("b5", _encoder(1.0, 3, inner=384, hidden=2048), 6, scale=8.0),
}


def dfine_detector(size: Size) -> DetectorConfig:
    """D-FINE's network of that size;
    stem and norms of the backbones of the larger two are frozen.
    """
    network, large = NETWORKS[size], size in ("l", "x")
    return DetectorConfig(
        backbone=BackboneConfig(
            name=f"hgnetv2_{network.backbone}.ssld_stage1_in22k_in1k",
            norm="frozen" if large else "batch",
            frozen="stem" if large else 0,
            strides=network.strides,
        ),
        width=network.width,
        encoder=network.encoder,
        queries=MixedQueriesConfig(
            content_from="states", position="boxes", proposal_targets="classes", empty_compete=True
        ),
        cross_attention=DeformableAttentionConfig(
            points=network.points, projected=False, position="box", position_limit=10.0
        ),
        decoder=DecoderConfig(
            layers=network.layers,
            hidden=network.hidden,
            refine="detached",
            gated=True,
            distributions=DistributionsConfig(scale=network.scale),
        ),
        dropout=0.0,
        top_k=300,
    )


def _recipe(size: Size, optim: OptimConfig, *, epochs: int, calm: int, **data: Any) -> Recipe:
    """D-FINE for `epochs`, the last `calm` of them without strong augmentation."""
    return Recipe(
        name=f"dfine-{size}",
        about=f"D-FINE-{size.upper()}, HGNetV2-{NETWORKS[size].backbone.upper()}, 640 pixels",
        detector=dfine_detector(size),
        loss=LossConfig(classification="vfl_detached", classes=1.0, union=True),
        schemes=SchemesConfig(cdn=CDNConfig()),
        optim=optim,
        schedule=ScheduleConfig(epochs=epochs, drops=(), warmup_steps=500),
        data=DATA.replace(calm=calm / epochs, **data),
    )


def _optim(lr: float, backbone: float, **changes: Any) -> OptimConfig:
    """`backbone`: its learning rate."""
    usual = {"batch_size": 32, "decay_norms": False, "ema": 0.9999, "ema_ramp": 1000}
    return OptimConfig(lr=lr, scaled={"backbone": backbone / lr}, **(usual | changes))


def dfine_n() -> Recipe:
    """D-FINE-N: two levels, at one size."""
    optim = _optim(8e-4, 4e-4, undecayed=("bias",), batch_size=128)
    return _recipe("n", optim, epochs=160, calm=12, multi_scale=(1.0, 1.0))


def dfine_s() -> Recipe:
    """D-FINE-S."""
    return _recipe("s", _optim(2e-4, 1e-4, undecayed=("bias",)), epochs=132, calm=12)


def dfine_m() -> Recipe:
    """D-FINE-M."""
    return _recipe("m", _optim(2e-4, 2e-5, undecayed=("bias",)), epochs=132, calm=12)


def dfine_l() -> Recipe:
    """D-FINE-L."""
    return _recipe("l", _optim(2.5e-4, 1.25e-5, weight_decay=1.25e-4), epochs=80, calm=8)


def dfine_x() -> Recipe:
    """D-FINE-X: an encoder of width 384, and distributions that reach twice as far."""
    return _recipe("x", _optim(2.5e-4, 2.5e-6, weight_decay=1.25e-4), epochs=80, calm=8)


RECIPES: Recipes = {
    "dfine-n": dfine_n,
    "dfine-s": dfine_s,
    "dfine-m": dfine_m,
    "dfine-l": dfine_l,
    "dfine-x": dfine_x,
}
