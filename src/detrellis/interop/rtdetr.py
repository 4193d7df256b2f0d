"""transformers' RT-DETR and RT-DETRv2: configuration files, and names of what a detector holds.

| where their code and the authors' differ | ours |
| --- | --- |
| references between decoder layers are detached | the authors': look forward twice, with the same outputs |
| statistics of BatchNorm are frozen whatever the depth, and no convolution is | the authors' (`recipes/rtdetr.py`) |
| fusions have three blocks, whatever the depth multiplier | as many as the recipe has, of which three can be saved |
| a denoising table is part of the checkpoint | it is a training scheme's, and left out |
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop.family import Config, Family, Loaded, Weights
from detrellis.interop.links import Pair
from detrellis.interop.names import QKV, feed_forward, sampling
from detrellis.recipes import rtdetr
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.overrides import merged

RECIPES = {
    "rt_detr": (rtdetr.rtdetr_r18, rtdetr.rtdetr_r34, rtdetr.rtdetr_r50, rtdetr.rtdetr_r101),
    "rt_detr_v2": (
        rtdetr.rtdetrv2_r18,
        rtdetr.rtdetrv2_r34,
        rtdetr.rtdetrv2_r50,
        rtdetr.rtdetrv2_r101,
    ),
}
# Their ResNet-vd's blocks and depths, in the order of the recipes, and the channels of its stages.
DEPTHS = (
    ("basic", [2, 2, 2, 2]),
    ("basic", [3, 4, 6, 3]),
    ("bottleneck", [3, 4, 6, 3]),
    ("bottleneck", [3, 4, 23, 3]),
)
CHANNELS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}
# What a file leaves out is the configuration class's default.
DEFAULTS: dict[str, Any] = {
    "d_model": 256,
    "num_queries": 300,
    "dropout": 0.0,
    "encoder_hidden_dim": 256,
    "encoder_layers": 1,
    "encoder_ffn_dim": 1024,
    "encoder_attention_heads": 8,
    "hidden_expansion": 1.0,
    "decoder_layers": 6,
    "decoder_ffn_dim": 1024,
    "decoder_attention_heads": 8,
    "decoder_n_points": 4,
    "decoder_activation_function": "relu",
    "num_feature_levels": 3,
    "decoder_offset_scale": 0.5,
    "decoder_method": "default",
    "backbone_config": {},
}
# Settings that change what is computed and that ours do not have, with the value that ours stand
# for.
FIXED = {
    "normalize_before": False,
    "learn_initial_query": False,
    "eval_size": None,
    "encoder_activation_function": "gelu",
    "activation_function": "silu",
    "positional_encoding_temperature": 10000,
    "batch_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
}
MLP = ("mlp.fc1", "mlp.fc2")
SAMPLING = {"default": "bilinear", "discrete": "discrete"}


def recipe_of(kind: str, config: Config) -> Recipe:
    """The recipe that a `config.json` describes: that of its depth, with the file's sizes."""
    full = {**DEFAULTS, **config}
    recipe = RECIPES[kind][_depth(full["backbone_config"])]()
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(
                f"config.json: {name}={config[name]!r} is not supported",
                f"Detrellis has {value!r}.",
            )
    levels = full["num_feature_levels"]
    if levels != 3 or list(config.get("encode_proj_layers", [2])) != [2]:
        raise UserError(
            "config.json: it has other levels than 3 with attention in the last",
            "No others are read.",
        )
    detector = DetectorConfig.checked(merged(recipe.detector.model_dump(), _sizes(kind, full)))
    return recipe.model_copy(update={"detector": detector})


def _sizes(kind: str, config: Config) -> dict[str, Any]:
    """The detector's fields that the file decides."""
    attention: dict[str, Any] = {"points": config["decoder_n_points"]}
    if kind == "rt_detr_v2":
        if config["decoder_method"] not in SAMPLING:
            known = f"Detrellis has {', '.join(SAMPLING)}."
            raise UserError(
                f"config.json: decoder_method={config['decoder_method']!r} is not supported", known
            )
        attention |= {
            "sampling": SAMPLING[config["decoder_method"]],
            "offset_scale": config["decoder_offset_scale"],
        }
    return {
        "backbone": {"pretrained": False},
        "width": config["d_model"],
        "encoder": {
            "layers": config["encoder_layers"],
            "heads": config["encoder_attention_heads"],
            "hidden": config["encoder_ffn_dim"],
            "inner": config["encoder_hidden_dim"],
            "expansion": float(config["hidden_expansion"]),
        },
        "queries": {"count": config["num_queries"], "empty_compete": True},
        "cross_attention": attention,
        "decoder": {
            "layers": config["decoder_layers"],
            "heads": config["decoder_attention_heads"],
            "hidden": config["decoder_ffn_dim"],
        },
        "dropout": float(config["dropout"]),
        "activation": config["decoder_activation_function"],
        "top_k": config["num_queries"],
    }


def _depth(backbone: Config) -> int:
    """Which of the four ResNet-vd it is."""
    blocks = backbone.get("layer_type", "bottleneck")
    depths = list(backbone.get("depths", [3, 4, 6, 3]))
    usual = list(backbone.get("hidden_sizes", CHANNELS["bottleneck"])) == CHANNELS.get(blocks)
    usual &= (
        backbone.get("model_type", "rt_detr_resnet") == "rt_detr_resnet"
        and backbone.get("embedding_size", 64) == 64
    )
    usual &= not (
        backbone.get("downsample_in_first_stage") or backbone.get("downsample_in_bottleneck")
    )
    if not usual or (blocks, depths) not in DEPTHS:
        raise UserError(
            f"config.json: the backbone_config of {blocks} blocks {depths} is not supported",
            "Detrellis reads rt_detr_resnet with 18, 34, 50 or 101 layers.",
        )
    return DEPTHS.index((blocks, depths))


def _holds(detector: DetectorConfig) -> bool:
    """Whether a detector is one of theirs: RT-DETR's parts on a ResNet-vd, nothing else."""
    encoder, attention, queries = detector.encoder, detector.cross_attention, detector.queries
    if encoder.kind != "hybrid" or attention.kind != "deformable" or queries.kind != "mixed":
        return False
    parts = queries.content_from == "states" and attention.position == "box" and encoder.blocks == 3
    decoder, backbone = detector.decoder, detector.backbone
    if (
        backbone.kind != "hierarchical"
        or not backbone.name.endswith("vd")
        or backbone.strides != (8, 16, 32)
    ):
        return False
    parts &= not (
        decoder.shared_heads
        or decoder.final_norm
        or decoder.refine == "none"
        or decoder.distinct is not None
    )
    parts &= (detector.scores, detector.iou_branch, detector.masks) == ("sigmoid", "none", None)
    return parts and isinstance(attention.points, int)


def kind_of(detector: DetectorConfig) -> str | None:
    """Their model type for a detector, the second where it samples in its own way;
    None where it is neither.
    """
    attention = detector.cross_attention
    if not _holds(detector) or attention.kind != "deformable":
        return None
    return (
        "rt_detr"
        if (attention.sampling, attention.offset_scale) == ("bilinear", 0.5)
        else "rt_detr_v2"
    )


def config_of(recipe: Recipe) -> dict[str, Any]:
    """See `Family`."""
    detector = recipe.detector
    encoder, attention, backbone = detector.encoder, detector.cross_attention, detector.backbone
    assert encoder.kind == "hybrid"
    assert attention.kind == "deformable"
    assert backbone.kind == "hierarchical"
    inner = encoder.inner or detector.width
    blocks, depths = DEPTHS[("18", "34", "50", "101").index(re.sub(r"\D", "", backbone.name))]
    config: dict[str, Any] = {
        "d_model": detector.width,
        "num_queries": detector.queries.count,
        "dropout": detector.dropout,
        "encoder_hidden_dim": inner,
        "encoder_in_channels": CHANNELS[blocks][1:],
        "encoder_layers": encoder.layers,
        "encoder_ffn_dim": encoder.hidden,
        "encoder_attention_heads": encoder.heads,
        "hidden_expansion": encoder.expansion,
        "decoder_in_channels": [inner] * 3,
        "decoder_layers": detector.decoder.layers,
        "decoder_ffn_dim": detector.decoder.hidden,
        "decoder_attention_heads": detector.decoder.heads,
        "decoder_n_points": attention.points,
        "decoder_activation_function": detector.activation,
        "num_denoising": 0,
        "backbone_config": {
            "model_type": "rt_detr_resnet",
            "layer_type": blocks,
            "depths": depths,
            "hidden_sizes": CHANNELS[blocks],
            "out_features": ["stage2", "stage3", "stage4"],
        },
    }
    if kind_of(detector) == "rt_detr_v2":
        method = {ours: theirs for theirs, ours in SAMPLING.items()}[attention.sampling]
        config |= {"decoder_offset_scale": attention.offset_scale, "decoder_method": method}
        # Tying would replace the class heads of all layers by the first one
        config["tie_word_embeddings"] = False
    return config


def modern(name: str) -> str:
    """A name on disk as transformers calls it in memory; one in memory stays as it is."""
    name = re.sub(r"encoder\.encoder\.(\d+)\.layers", r"encoder.aifi.\1.layers", name)
    name = re.sub(r"layers\.(\d+)\.(fc[12])\.", r"layers.\1.mlp.\2.", name)
    return name.replace(".out_proj.", ".o_proj.")


def on_disk(name: str) -> str:
    """The inverse of `modern`: what every version of transformers reads."""
    name = re.sub(r"encoder\.aifi\.(\d+)\.layers", r"encoder.encoder.\1.layers", name)
    name = re.sub(r"layers\.(\d+)\.mlp\.(fc[12])\.", r"layers.\1.\2.", name)
    return name.replace(".o_proj.", ".out_proj.")


def table(detector: DetectorConfig, kind: str) -> list[Pair]:
    """Names in memory, which `modern` makes of those on disk;
    the second version has a copy of its heads.
    """
    copies = "" if kind == "rt_detr" else "|{}"
    return [
        *_resnet_vd("model.backbone.model"),
        *_hybrid(detector),
        Pair("queries.head.projection", "model.enc_output.0"),
        Pair("queries.head.norm", "model.enc_output.1"),
        Pair("queries.head.classify", "model.enc_score_head"),
        Pair("queries.head.move.@", "model.enc_bbox_head.@"),
        Pair("decoder.position.mlp.@", "model.decoder.query_pos_head.@"),
        Pair(
            "decoder.layers.*.self_attention.projections", f"model.decoder.layers.*.self_attn.{QKV}"
        ),
        Pair("decoder.layers.*.self_attention.output", "model.decoder.layers.*.self_attn.o_proj"),
        *sampling("decoder.layers.*.cross_attention", "model.decoder.layers.*.encoder_attn"),
        Pair("decoder.layers.*.norm_self", "model.decoder.layers.*.self_attn_layer_norm"),
        Pair("decoder.layers.*.norm_cross", "model.decoder.layers.*.encoder_attn_layer_norm"),
        *feed_forward("decoder.layers.*", "model.decoder.layers.*", "final_layer_norm", MLP),
        Pair(
            "decoder.heads.classes.*",
            "model.decoder.class_embed.*" + copies.format("class_embed.*"),
        ),
        *(
            Pair(
                f"decoder.heads.boxes.*.{layer}",
                f"model.decoder.bbox_embed.*.{layer}" + copies.format(f"bbox_embed.*.{layer}"),
            )
            for layer in (f"layers.{k}" for k in range(3))
        ),
    ]


def _hybrid(config: DetectorConfig) -> list[Pair]:
    """The neck; AIFI's one map is the coarsest."""
    rows = [
        *hybrid_levels(),
        *feed_forward("neck.layers.*", "model.encoder.aifi.0.layers.*", "final_layer_norm", MLP),
        *normed("neck.downs.*", "model.encoder.downsample_convs.*"),
    ]
    for way, blocks in (("top_down", "fpn_blocks"), ("bottom_up", "pan_blocks")):
        for i in range(len(config.backbone.strides) - 1):
            rows += csp(f"neck.{way}.{i}", f"model.encoder.{blocks}.{i}")
    return rows


def hybrid_levels() -> list[Pair]:
    """What a hybrid encoder has whatever its fusions are: projections, and AIFI's attention."""
    aifi = "model.encoder.aifi.0.layers.*"
    return [
        Pair("neck.layers.*.attention.projections", f"{aifi}.self_attn.{QKV}"),
        Pair("neck.layers.*.attention.output", f"{aifi}.self_attn.o_proj"),
        Pair("neck.layers.*.norm", f"{aifi}.self_attn_layer_norm"),
        *normed("neck.projections.*", "model.encoder_input_proj.*", ("0", "1")),
        *normed("neck.outputs.*", "model.decoder_input_proj.*", ("0", "1")),
        *normed("neck.laterals.*", "model.encoder.lateral_convs.*"),
    ]


def csp(ours: str, theirs: str) -> list[Pair]:
    """A CSP layer."""
    rows = []
    for part, their_part in (("first", "conv1"), ("bypass", "conv2"), ("last", "conv3")):
        rows += normed(f"{ours}.{part}", f"{theirs}.{their_part}")
    for part, their_part in (("wide", "conv1"), ("point", "conv2")):
        rows += normed(f"{ours}.blocks.*.{part}", f"{theirs}.bottlenecks.*.{their_part}")
    return rows


def normed(ours: str, theirs: str, parts: tuple[str, str] = ("conv", "norm")) -> list[Pair]:
    """A convolution and its norm."""
    return [
        Pair(f"{ours}.convolution", f"{theirs}.{parts[0]}"),
        Pair(f"{ours}.norm", f"{theirs}.{parts[1]}"),
    ]


def _resnet_vd(prefix: str) -> list[Pair]:
    parts = ("convolution", "normalization")
    stem = f"{prefix}.embedder.embedder"
    norms = ("backbone.stem.0.1", "backbone.stem.0.4", "backbone.stem.1")
    rows = [Pair(f"backbone.stem.0.{3 * k}", f"{stem}.{k}.{parts[0]}") for k in range(3)]
    rows += [Pair(norm, f"{stem}.{k}.{parts[1]}") for k, norm in enumerate(norms)]
    for stage in range(4):
        ours = f"backbone.stages.layer{stage + 1}.*"
        theirs = f"{prefix}.encoder.stages.{stage}.layers.*"
        for k in range(3):
            rows.append(Pair(f"{ours}.conv{k + 1}", f"{theirs}.layer.{k}.{parts[0]}"))
            rows.append(Pair(f"{ours}.bn{k + 1}", f"{theirs}.layer.{k}.{parts[1]}"))
        shortcut = f"{theirs}.shortcut" + (".1" if stage else "")  # behind the pooling
        rows += [
            Pair(f"{ours}.downsample.{1 + i}", f"{shortcut}.{part}") for i, part in enumerate(parts)
        ]
    return rows


def _loaded(kind: str, weights: Weights, detector: DetectorConfig, config: Config) -> Loaded:
    return Loaded({modern(name): value for name, value in weights.items()}, table(detector, kind))


def _stored(weights: Weights, recipe: Recipe, classes: int) -> dict[str, Tensor]:
    return {on_disk(name): value for name, value in weights.items()}


def _family(kind: str, about: str, model: str) -> Family:
    return Family(
        about,
        model,
        "RTDetrImageProcessor",
        partial(recipe_of, kind),
        config_of,
        partial(_loaded, kind),
        partial(table, kind=kind),
        _stored,
        detections=None,
    )


FAMILIES = {
    "rt_detr": _family("rt_detr", "RT-DETR", "RTDetrForObjectDetection"),
    "rt_detr_v2": _family("rt_detr_v2", "RT-DETRv2", "RTDetrV2ForObjectDetection"),
}
