"""Hugging Face's configuration files, and what they say about a detector: DETR, Conditional DETR, DAB-DETR, Deformable
DETR, and through `interop/lwdetr.py` and `rtdetr.py` LW-DETR and RF-DETR, RT-DETR and RT-DETRv2.

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
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop import dfine, lwdetr, lwdetr_names, mask2former, mask2former_config, rtdetr
from detrellis.interop.links import Pair
from detrellis.interop.names import huggingface as detr_names
from detrellis.interop.names import modern, on_disk, tied_heads
from detrellis.recipes.conditional import conditional_detr_r50
from detrellis.recipes.config import Recipe
from detrellis.recipes.dab import dab_detr_r50
from detrellis.recipes.deformable import deformable_detr_r50, deformable_detr_r50_two_stage
from detrellis.recipes.detector import BackboneConfig, DetectorConfig
from detrellis.recipes.detr import detr_r50
from detrellis.recipes.dfine import dfine_l
from detrellis.recipes.lwdetr import lwdetr_tiny, rfdetr_nano
from detrellis.recipes.mask2former import mask2former_r50
from detrellis.recipes.overrides import merged

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]

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


class Family(NamedTuple):
    """What transformers has of one of its model types."""

    recipe: Callable[[], Recipe]
    model: str  # its class
    processor: str  # the class of its image processor
    defaults: dict[str, Any]  # where they differ from `DEFAULTS`


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
FAMILIES = {
    "detr": Family(detr_r50, "DetrForObjectDetection", "DetrImageProcessor", {"num_queries": 100}),
    "conditional_detr": Family(
        conditional_detr_r50, "ConditionalDetrForObjectDetection", "ConditionalDetrImageProcessor", {}
    ),
    "dab-detr": Family(dab_detr_r50, "DabDetrForObjectDetection", "ConditionalDetrImageProcessor", DAB_DEFAULTS),
    "deformable_detr": Family(
        deformable_detr_r50, "DeformableDetrForObjectDetection", "DeformableDetrImageProcessor", DEFORMABLE_DEFAULTS
    ),
    dfine.KIND: Family(dfine_l, dfine.MODEL, dfine.PROCESSOR, {}),
    lwdetr.LW: Family(lwdetr_tiny, "LwDetrForObjectDetection", "DeformableDetrImageProcessor", {}),
    **{kind: Family(recipes[0], rtdetr.MODELS[kind], rtdetr.PROCESSOR, {}) for kind, recipes in rtdetr.RECIPES.items()},
    lwdetr.RF: Family(rfdetr_nano, "RfDetrForObjectDetection", "RfDetrImageProcessor", {}),
    "mask2former": Family(mask2former_r50, "Mask2FormerForUniversalSegmentation", "Mask2FormerImageProcessor", {}),
}
# Settings that change what is computed and that ours do not have, with the value that ours stand for.
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


def kind_of(config: Config) -> str:
    """The model type of a `config.json`, one of those that ours can be."""
    kind = str(config.get("model_type", "")).replace("dab_detr", "dab-detr")
    if kind not in FAMILIES:
        raise UserError(f"model_type {kind!r} is not one that Detrellis has", f"Known: {', '.join(FAMILIES)}.")
    return kind


def recipe_of(config: Config) -> Recipe:
    """The recipe that a `config.json` describes: its family's, with the file's sizes."""
    kind = kind_of(config)
    if kind in lwdetr.RECIPES:
        return lwdetr.recipe_of(kind, config)
    if kind == dfine.KIND:
        return dfine.recipe_of(config)
    if kind in rtdetr.RECIPES:
        return rtdetr.recipe_of(kind, config)
    family = FAMILIES[kind]
    if kind == mask2former_config.KIND:
        return mask2former_config.recipe_of(config, partial(_backbone, several=True))
    aliases = {} if kind == "dab-detr" else {ours: config[name] for name, ours in ALIASES.items() if name in config}
    full = {**DEFAULTS, **family.defaults, **aliases, **config}
    recipe = deformable_detr_r50_two_stage() if kind == "deformable_detr" and full["two_stage"] else family.recipe()
    detector = DetectorConfig.checked(merged(recipe.detector.model_dump(), _sizes(kind, full)))
    return recipe.model_copy(update={"name": kind.replace("_", "-"), "detector": detector})


def _sizes(kind: str, config: Config) -> dict[str, Any]:
    """The detector's fields that the file decides."""
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"config.json: {name}={config[name]!r} is not supported", f"Detrellis has {value!r}.")
    activation = config["activation_function"]
    if activation not in ACTIVATIONS:
        known = f"Detrellis has {', '.join(ACTIVATIONS)}."
        raise UserError(f"config.json: activation_function={activation!r} is not supported", known)
    deformable = kind == "deformable_detr"
    found = {
        "backbone": _backbone(config, several=deformable and config["num_feature_levels"] > 1).model_dump(),
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
            raise UserError("config.json: temperature_height and temperature_width differ: not supported")
        found["position_temperature"] = float(config["temperature_height"])
        found["queries"]["patterns"] = config["num_patterns"]
    return merged(found, _deformable_sizes(config)) if deformable else found


def _deformable_sizes(config: Config) -> dict[str, Any]:
    two_stage = bool(config["two_stage"])
    if two_stage and not config["with_box_refine"]:
        raise UserError("config.json: two_stage needs with_box_refine", "transformers refuses it too.")
    return {
        "encoder": {"levels": config["num_feature_levels"], "points": config["encoder_n_points"]},
        "cross_attention": {"points": config["decoder_n_points"]},
        "queries": {"count": config["two_stage_num_proposals"], "empty_compete": True} if two_stage else {},
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
    indices = backbone.get("out_indices") or [int(str(n)[-1]) for n in backbone.get("out_features") or []]
    stages = [int(i) % 5 for i in indices]  # of the stem and four stages; also counted from the end
    return tuple(2 ** (stage + 1) for stage in stages if stage > 0) or usual


def _native_resnet(own: Config) -> str:
    """The name of transformers' own ResNet of these depths, empty where it has none."""
    kind = (own.get("layer_type", "bottleneck"), tuple(own.get("depths", (3, 4, 6, 3))))
    sizes = [64, 128, 256, 512] if kind[0] == "basic" else [256, 512, 1024, 2048]
    usual = list(own.get("hidden_sizes", [256, 512, 1024, 2048])) == sizes and own.get("embedding_size", 64) == 64
    changed = own.get("downsample_in_first_stage") or own.get("downsample_in_bottleneck")
    return BLOCKS.get(kind, "") if usual and not changed and own.get("hidden_act", "relu") == "relu" else ""


def _backbone(config: Config, *, several: bool) -> BackboneConfig:
    """A ResNet with frozen norms; what is trained in it comes with the file."""
    own = config.get("backbone_config") or config.get("backbone_kwargs") or {}
    native = is_native(config)
    if native:
        name, described = _native_resnet(own), f"of {own.get('layer_type', 'bottleneck')} blocks {own.get('depths')}"
    else:
        described = own.get("backbone") or config.get("backbone") or "resnet50"
        kind = own.get("model_type", "timm_backbone")
        name, described = (str(described).split(".")[0], described) if kind == "timm_backbone" else ("", kind)
    if name not in BLOCKS.values():
        known = f"Detrellis reads {', '.join(BLOCKS.values())}, transformers' own and timm's."
        raise UserError(f"config.json: the backbone_config {described!r} is not supported", known)
    strides = _strides(own, (8, 16, 32) if several and not native else (32,))
    dilated = own.get("output_stride") or (16 if config.get("dilation") and not config.get("backbone_config") else 32)
    if dilated not in (16, 32):
        raise UserError(
            f"config.json: backbone_config.output_stride={dilated} is not supported", "It is 16 or 32 here."
        )
    strides = strides if several else strides[-1:]
    dilation = dilated == 16 and not native  # which transformers' own does not know
    return BackboneConfig(name=name, pretrained=False, norm="frozen", dilation=dilation, strides=strides)


def family_of(detector: DetectorConfig) -> str:
    """Their model type for a detector. `UserError` with the reason where they have none."""
    if (plain := lwdetr.kind_of(detector)) is not None:
        return plain
    if dfine.holds(detector):
        return dfine.KIND
    if rtdetr.holds(detector):
        return rtdetr.kind_of(detector)
    if not detector.boxes:
        return mask2former_config.KIND
    encoder, attention, queries = detector.encoder.kind, detector.cross_attention.kind, detector.queries
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
        raise UserError(
            "this detector cannot be saved for transformers: it has no such model",
            "It has DETR, Conditional DETR, DAB-DETR, DN-DETR (as DAB-DETR) and Deformable DETR with learned queries "
            "or proposals, each with a ResNet; RT-DETR and RT-DETRv2; LW-DETR and RF-DETR.",
        )
    expected = FAMILIES[kind].recipe().detector
    for name in ("scores", "position_temperature", "position_offset", "decoder.final_norm", "iou_branch"):
        own, theirs = (attrgetter(name)(config) for config in (detector, expected))
        if own != theirs and (kind, name) != ("dab-detr", "position_temperature"):
            raise UserError(f"this detector cannot be saved for transformers: {name}={own}, theirs is {theirs}")
    return kind


def _is_resnet(detector: DetectorConfig) -> bool:
    backbone = detector.backbone
    return backbone.kind == "hierarchical" and re.fullmatch(r"resnet\d+", backbone.name) is not None


def config_of(recipe: Recipe, names: Mapping[int, str]) -> dict[str, Any]:
    """Their `config.json` for a recipe whose classes are called `names`."""
    detector = recipe.detector
    kind = family_of(detector)
    own = {dfine.KIND: dfine.config_of, **dict.fromkeys(lwdetr.RECIPES, lwdetr.config_of)}
    own |= dict.fromkeys(rtdetr.RECIPES, rtdetr.config_of)
    if kind == mask2former_config.KIND:
        network = mask2former_config.config_of(recipe, BLOCKS)
    else:
        network = own[kind](detector) if kind in own else _network(kind, detector)
    return network | {
        "architectures": [FAMILIES[kind].model],
        "model_type": kind,
        "id2label": {str(i): name for i, name in names.items()},
        "label2id": {name: i for i, name in names.items()},
        "dtype": "float32",
    }


def _network(kind: str, detector: DetectorConfig) -> dict[str, Any]:
    """What `config.json` says of the network, without its classes."""
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
        config |= {"temperature_height": temperature, "temperature_width": temperature, "num_patterns": patterns}
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


def loaded(kind: str, weights: Weights, detector: DetectorConfig, native: bool) -> tuple[dict[str, Tensor], list[Pair]]:
    """Their tensors, and the table of the names that they have; `native`: the backbone is transformers' own ResNet."""
    if kind in lwdetr.RECIPES:
        given = {lwdetr_names.modern(name): value for name, value in weights.items()} if kind == lwdetr.LW else weights
        rows = lwdetr_names.authors_table if lwdetr_names.is_authors(weights) else lwdetr_names.table
        return lwdetr_names.completed(given, detector.queries.count), rows(detector)
    if kind == dfine.KIND:
        return {dfine.modern(name): value for name, value in weights.items()}, dfine.table(detector)
    if kind in rtdetr.RECIPES:
        return {rtdetr.modern(name): value for name, value in weights.items()}, rtdetr.table(detector, kind)
    if kind == mask2former_config.KIND:
        return mask2former.as_linear(weights), mask2former.huggingface(detector)
    given = {modern(name, kind): value for name, value in weights.items()}
    return given | tied_heads(given, detector.decoder.layers), detr_names(detector, native)


def saved_names(kind: str, detector: DetectorConfig) -> list[Pair]:
    """The table of the names that `stored` expects."""
    if kind == mask2former_config.KIND:
        return mask2former.huggingface(detector)
    if kind == lwdetr.RF:
        return lwdetr_names.authors_table(detector)
    if kind == dfine.KIND or kind in rtdetr.RECIPES:
        return dfine.table(detector) if kind == dfine.KIND else rtdetr.table(detector, kind)
    return lwdetr_names.table(detector) if kind == lwdetr.LW else detr_names(detector)


def stored(kind: str, weights: Weights, detector: DetectorConfig) -> dict[str, Tensor]:
    """Their tensors by the names that every version of transformers reads from a disk."""
    if kind == dfine.KIND:
        return {dfine.on_disk(n): v for n, v in {**weights, **dfine.constants(detector, weights)}.items()}
    if kind == mask2former_config.KIND:
        return mask2former.as_convolutions(weights)
    if kind in lwdetr.RECIPES:
        kept = lwdetr_names.stored(weights)
        return kept if kind == lwdetr.RF else {lwdetr_names.on_disk(name): value for name, value in kept.items()}
    return {rtdetr.on_disk(n) if kind in rtdetr.RECIPES else on_disk(n, kind): v for n, v in weights.items()}
