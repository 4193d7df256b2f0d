"""DETR, Conditional DETR, DAB-DETR and Deformable DETR of transformers:
their configuration files and tensors.

| where their code and the reference differ | ours |
| --- | --- |
| `auxiliary_loss` feeds normed states to the next layer, which changes predictions | the reference: never |
| DAB-DETR's inverse sigmoid clamps at 1e-5, the reference at 1e-3 | 1e-5 in what comes from them |
| their processors keep 100 detections, DAB-DETR's reference 300 | 100 in what comes from them |
| dropouts of attention and activations, and layer drop, have rates of their own | one rate for all |
| box refinement ties the class heads of all layers where a file holds one | a head a layer, all of them written |
"""

from __future__ import annotations

import re
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop.family import Config, Family, Loaded, Weights
from detrellis.interop.names import huggingface, modern, on_disk, tied_heads
from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.conditional import conditional_detr_r50
from detrellis.recipes.config import Recipe
from detrellis.recipes.dab import dab_detr_r50
from detrellis.recipes.deformable import deformable_detr_r50, deformable_detr_r50_two_stage
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.detr import detr_r50
from detrellis.recipes.overrides import merged

# What a file leaves out is the configuration class's default.
DEFAULTS: dict[str, Any] = {
    "d_model": 256,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "num_queries": 300,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "dropout": 0.1,
    "activation_function": "relu",
    "position_embedding_type": "sine",
}


DAB_DEFAULTS = {
    "activation_function": "prelu",
    "hidden_size": 256,
    "num_patterns": 0,
    "temperature_height": 20,
    "temperature_width": 20,
}
DEFORMABLE_DEFAULTS = {
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "num_feature_levels": 4,
    "encoder_n_points": 4,
    "decoder_n_points": 4,
    "two_stage": False,
    "two_stage_num_proposals": 300,
    "with_box_refine": False,
}
RECIPES = {
    "detr": detr_r50,
    "conditional_detr": conditional_detr_r50,
    "dab-detr": dab_detr_r50,
    "deformable_detr": deformable_detr_r50,
}
# Where they differ from `DEFAULTS`.
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "detr": {"num_queries": 100},
    "conditional_detr": {},
    "dab-detr": DAB_DEFAULTS,
    "deformable_detr": DEFORMABLE_DEFAULTS,
}
# Settings that change what is computed and that ours do not have, with the value that ours stand
# for.
FIXED = {
    "num_channels": 3,
    "position_embedding_type": "sine",
    "keep_query_pos": False,
    "normalize_before": False,
    "sine_position_embedding_scale": None,
    "query_dim": 4,
}
ALIASES = {  # what all but DAB-DETR's files may call the same
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
}
# Sizes that encoder and decoder have each: our name.
SIZES = {"layers": "layers", "ffn_dim": "hidden", "attention_heads": "heads"}
ACTIVATIONS = {"relu": "relu", "prelu": "prelu", "gelu": "gelu", "silu": "silu", "swish": "silu"}
BLOCKS: dict[tuple[str, tuple[int, ...]], str] = {  # depths of their own ResNet: its name
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
}


def recipe_of(kind: str, config: Config) -> Recipe:
    """The recipe that a `config.json` describes: its family's, with the file's sizes."""
    aliases = (
        {}
        if kind == "dab-detr"
        else {ours: config[name] for name, ours in ALIASES.items() if name in config}
    )
    full = {**DEFAULTS, **OWN_DEFAULTS[kind], **aliases, **config}
    recipe = (
        deformable_detr_r50_two_stage()
        if kind == "deformable_detr" and full["two_stage"]
        else RECIPES[kind]()
    )
    detector = DetectorConfig.checked(merged(recipe.detector.model_dump(), _sizes(kind, full)))
    return recipe.model_copy(update={"name": kind.replace("_", "-"), "detector": detector})


def _sizes(kind: str, config: Config) -> dict[str, Any]:
    """The detector's fields that the file decides."""
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(
                f"config.json: {name}={config[name]!r} is not supported",
                f"Detrellis has {value!r}.",
            )
    activation = config["activation_function"]
    if activation not in ACTIVATIONS:
        known = f"Detrellis has {', '.join(ACTIVATIONS)}."
        raise UserError(f"config.json: activation_function={activation!r} is not supported", known)
    deformable = kind == "deformable_detr"
    sizes = {
        "backbone": resnet_of(
            config, several=deformable and config["num_feature_levels"] > 1
        ).model_dump(),
        "width": config["hidden_size"] if kind == "dab-detr" else config["d_model"],
        "encoder": _part(config, "encoder"),
        "decoder": _part(config, "decoder"),
        "queries": {"count": config["num_queries"]},
        "dropout": config["dropout"],
        "activation": ACTIVATIONS[activation],
        "eps": 1e-5,
        "top_k": config["num_queries"] if kind == "detr" else 100,
    }
    if kind == "dab-detr":
        if config["temperature_height"] != config["temperature_width"]:
            raise UserError(
                "config.json: temperature_height and temperature_width differ: not supported"
            )
        sizes["position_temperature"] = float(config["temperature_height"])
        sizes["queries"]["patterns"] = config["num_patterns"]
    return merged(sizes, _deformable_sizes(config)) if deformable else sizes


def _deformable_sizes(config: Config) -> dict[str, Any]:
    two_stage = bool(config["two_stage"])
    if two_stage and not config["with_box_refine"]:
        raise UserError(
            "config.json: two_stage needs with_box_refine", "transformers refuses it too."
        )
    return {
        "encoder": {"levels": config["num_feature_levels"], "points": config["encoder_n_points"]},
        "cross_attention": {"points": config["decoder_n_points"]},
        "queries": {"count": config["two_stage_num_proposals"], "empty_compete": True}
        if two_stage
        else {},
        "decoder": {"refine": "detached" if config["with_box_refine"] else "none"},
    }


def _part(config: Config, part: str) -> dict[str, Any]:
    """The sizes of the encoder, or of the decoder."""
    return {ours: config[f"{part}_{theirs}"] for theirs, ours in SIZES.items()}


def is_native(config: Config) -> bool:
    """Whether the backbone is transformers' own ResNet instead of timm's."""
    backbone = config.get("backbone_config")
    if not backbone:
        return config.get("use_timm_backbone") is False
    return bool(backbone.get("model_type") == "resnet")


def _strides(backbone: Config, usual: tuple[int, ...]) -> tuple[int, ...]:
    """Of the maps that the backbone gives; `usual` where it does not say."""
    indices = backbone.get("out_indices") or [
        int(str(n)[-1]) for n in backbone.get("out_features") or []
    ]
    stages = [int(i) % 5 for i in indices]  # of the stem and four stages; also counted from the end
    return tuple(2 ** (stage + 1) for stage in stages if stage > 0) or usual


def _native_resnet(config: Config) -> str:
    """The name of transformers' own ResNet of these depths, empty where it has none."""
    kind = (config.get("layer_type", "bottleneck"), tuple(config.get("depths", (3, 4, 6, 3))))
    sizes = [64, 128, 256, 512] if kind[0] == "basic" else [256, 512, 1024, 2048]
    usual = (
        list(config.get("hidden_sizes", [256, 512, 1024, 2048])) == sizes
        and config.get("embedding_size", 64) == 64
    )
    changed = config.get("downsample_in_first_stage") or config.get("downsample_in_bottleneck")
    return (
        BLOCKS.get(kind, "")
        if usual and not changed and config.get("hidden_act", "relu") == "relu"
        else ""
    )


def resnet_of(config: Config, *, several: bool) -> BackboneConfig:
    """A ResNet with frozen norms; what is trained in it comes with the file."""
    inner = config.get("backbone_config") or config.get("backbone_kwargs") or {}
    native = is_native(config)
    if native:
        name = _native_resnet(inner)
        described = f"of {inner.get('layer_type', 'bottleneck')} blocks {inner.get('depths')}"
    else:
        described = inner.get("backbone") or config.get("backbone") or "resnet50"
        kind = inner.get("model_type", "timm_backbone")
        name, described = (
            (str(described).split(".")[0], described) if kind == "timm_backbone" else ("", kind)
        )
    if name not in BLOCKS.values():
        known = f"Detrellis reads {', '.join(BLOCKS.values())}, transformers' own and timm's."
        raise UserError(f"config.json: the backbone_config {described!r} is not supported", known)
    strides = _strides(inner, (8, 16, 32) if several and not native else (32,))
    dilated = inner.get("output_stride") or (
        16 if config.get("dilation") and not config.get("backbone_config") else 32
    )
    if dilated not in (16, 32):
        raise UserError(
            f"config.json: backbone_config.output_stride={dilated} is not supported",
            "It is 16 or 32 here.",
        )
    strides = strides if several else strides[-1:]
    dilation = dilated == 16 and not native  # which transformers' own does not know
    return BackboneConfig(
        name=name, pretrained=False, norm="frozen", dilation=dilation, strides=strides
    )


def kind_of(detector: DetectorConfig) -> str | None:
    """Their model type for a detector; None where it is none of these.
    `UserError` where a part of it is unusual.
    """
    encoder = detector.encoder.kind
    attention = detector.cross_attention.kind
    queries = detector.queries
    kind = {
        ("dense", "dense", "learned"): "detr",
        ("dense", "conditional", "learned"): "conditional_detr",
        ("dense", "conditional", "anchors"): "dab-detr",
        ("deformable", "deformable", "learned"): "deformable_detr",
        ("deformable", "deformable", "proposals"): "deformable_detr",
    }.get((encoder, attention, queries.kind))
    single = attention == "deformable" and detector.decoder.final_norm
    dense = encoder == "dense" or queries.kind == "anchors"
    unusual = dense and queries.kind in ("learned", "anchors") and queries.content == "learned"
    if kind is None or single or unusual or not _is_resnet(detector):
        return None
    expected = RECIPES[kind]().detector
    for name in (
        "scores",
        "position_temperature",
        "position_offset",
        "decoder.final_norm",
        "iou_branch",
    ):
        ours, theirs = (attrgetter(name)(config) for config in (detector, expected))
        if ours != theirs and (kind, name) != ("dab-detr", "position_temperature"):
            raise UserError(
                f"this detector cannot be saved for transformers: {name}={ours}, theirs is {theirs}"
            )
    return kind


def _is_resnet(detector: DetectorConfig) -> bool:
    backbone = detector.backbone
    return backbone.kind == "hierarchical" and re.fullmatch(r"resnet\d+", backbone.name) is not None


def config_of(kind: str, recipe: Recipe) -> dict[str, Any]:
    """What `config.json` says of the network, without its classes."""
    detector = recipe.detector
    deformable, backbone = kind == "deformable_detr", detector.backbone
    assert isinstance(backbone, BackboneConfig)
    config: dict[str, Any] = {
        "hidden_size" if kind == "dab-detr" else "d_model": detector.width,
        "num_queries": detector.queries.count,
        "dropout": detector.dropout,
        "attention_dropout": 0.0 if deformable else detector.dropout,
        "activation_function": detector.activation,
        "auxiliary_loss": False,
        "dilation": backbone.dilation,
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": backbone.name,
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [stride.bit_length() - 2 for stride in backbone.strides],
            "output_stride": 16 if backbone.dilation else None,
        },
    }
    for name, part in (("encoder", detector.encoder), ("decoder", detector.decoder)):
        config |= {f"{name}_{theirs}": getattr(part, ours) for theirs, ours in SIZES.items()}
    if detector.queries.kind == "anchors":
        temperature = int(detector.position_temperature)
        # DN-DETR's one content for all queries is a pattern.
        patterns = detector.queries.patterns or (1 if detector.queries.content == "shared" else 0)
        config |= {
            "temperature_height": temperature,
            "temperature_width": temperature,
            "num_patterns": patterns,
        }
        config["random_refpoints_xy"] = detector.queries.fixed_centres
    if detector.encoder.kind == "deformable" and detector.cross_attention.kind == "deformable":
        two_stage = detector.queries.kind == "proposals"
        config |= {
            "encoder_n_points": detector.encoder.points,
            "decoder_n_points": detector.cross_attention.points,
            "num_feature_levels": detector.encoder.levels,
            "two_stage": two_stage,
            "two_stage_num_proposals": detector.queries.count,
            "with_box_refine": detector.decoder.refine != "none",
            # Tying would replace the class heads of all layers by the first one.
            "tie_word_embeddings": False,
        }
    return config


def loaded(kind: str, weights: Weights, detector: DetectorConfig, config: Config) -> Loaded:
    """See `Family`."""
    given = {modern(name, kind): value for name, value in weights.items()}
    return Loaded(
        given | tied_heads(given, detector.decoder.layers), huggingface(detector, is_native(config))
    )


def stored(kind: str, weights: Weights, recipe: Recipe, classes: int) -> dict[str, Tensor]:
    """See `Family`."""
    return {on_disk(name, kind): value for name, value in weights.items()}


def _family(
    kind: str, about: str, model: str, processor: str, detections: int | None = 100
) -> Family:
    return Family(
        about,
        model,
        processor,
        partial(recipe_of, kind),
        partial(config_of, kind),
        partial(loaded, kind),
        huggingface,
        partial(stored, kind),
        detections,
    )


FAMILIES = {
    "detr": _family("detr", "DETR", "DetrForObjectDetection", "DetrImageProcessor", None),
    "conditional_detr": _family(
        "conditional_detr",
        "Conditional DETR",
        "ConditionalDetrForObjectDetection",
        "ConditionalDetrImageProcessor",
    ),
    "dab-detr": _family(
        "dab-detr",
        "DAB-DETR (also DN-DETR)",
        "DabDetrForObjectDetection",
        "ConditionalDetrImageProcessor",
    ),
    "deformable_detr": _family(
        "deformable_detr",
        "Deformable DETR with learned queries or proposals",
        "DeformableDetrForObjectDetection",
        "DeformableDetrImageProcessor",
    ),
}
