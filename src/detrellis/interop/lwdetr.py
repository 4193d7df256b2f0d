"""LW-DETR and RF-DETR of transformers, and of their authors' repositories:
configuration files and names.

| where transformers, the authors and ours differ | ours |
| --- | --- |
| a file holds the queries and proposal heads of all groups of training | the first group's: the others are a scheme's |
| CAE's keys have no bias, ours has one that a softmax does not see | 0 on load, dropped on save |
| tokens that can propose nothing: last in transformers, ranked by the authors | last |
| norms of RF-DETR's projector: 1e-5 in transformers, 1e-6 in the authors' training | what the file says, 1e-6 else |
| post-processing keeps 100 detections in LW-DETR's processor, as many as queries in the authors' | as many as queries |
| a block of RF-DETR's backbone behind the last map | not there |
| RF-DETR's pictures are made smaller without antialiasing in transformers, with it by the authors | as in its source |
"""

from __future__ import annotations

import re
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop import lwdetr_names
from detrellis.interop.family import Config, Family, Loaded, Weights
from detrellis.recipes.backbones import WindowViTConfig
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.encoders import ProjectorEncoderConfig
from detrellis.recipes.lwdetr import lwdetr_tiny, rfdetr_nano
from detrellis.recipes.overrides import merged

LW, RF = "lw_detr", "rf_detr"
RF_PROCESSOR = "RfDetrImageProcessor"
RECIPES = {LW: lwdetr_tiny, RF: rfdetr_nano}
DEFAULTS: dict[str, Any] = {
    "c2f_num_blocks": 3,
    "d_model": 256,
    "decoder_cross_attention_heads": 16,
    "decoder_ffn_dim": 2048,
    "decoder_layers": 3,
    "decoder_n_points": 4,
    "decoder_self_attention_heads": 8,
    "group_detr": 13,
    "num_queries": 300,
}
DINOV2 = {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 14,
    "num_windows": 4,
    "image_size": 224,
}
CAE = {"num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16, "num_windows": 16}
BACKBONE_DEFAULTS: dict[str, dict[str, Any]] = {
    LW: {**CAE, "hidden_size": 768, "pretrain_image_size": 224, "window_block_indices": ()},
    RF: {**DINOV2, "hidden_size": 768},
}
# What a file without a backbone means.
BACKBONES: dict[str, dict[str, Any]] = {
    LW: {
        "hidden_size": 192,
        "num_hidden_layers": 10,
        "window_block_indices": (0, 1, 3, 6, 7, 9),
        "out_indices": (2, 4, 5, 9),
    },
    RF: {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "image_size": 518,
        "out_features": ("stage2", "stage5", "stage8", "stage11"),
    },
}
# Settings that change what is computed and that ours do not have, with the value that ours stand
# for.
FIXED: dict[str, Any] = {
    "activation_function": "silu",
    "attention_bias": True,
    "batch_norm_eps": 1e-5,
    "decoder_activation_function": "relu",
    "hidden_expansion": 0.5,
}
BACKBONE_FIXED: dict[str, Any] = {
    "apply_layernorm": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4,
    "num_channels": 3,
    "qkv_bias": True,
    "use_absolute_position_embeddings": True,
    "use_swiglu_ffn": False,
}


# What their models have in one form only.
UNLIKE = (
    "scores",
    "box_encoding",
    "activation",
    "iou_branch",
    "queries.kind",
    "queries.content_from",
    "queries.position",
    "queries.deltas",
    "cross_attention.kind",
    "decoder.refine",
    "decoder.final_norm",
)


def recipe_of(kind: str, config: Config) -> Recipe:
    """The recipe that a `config.json` of that model type describes:
    its family's, with the file's sizes.
    """
    backbone_config = config.get("backbone_config") or BACKBONES[kind]
    for given, fixed, where in (
        (config, FIXED, ""),
        (backbone_config, BACKBONE_FIXED, "backbone_config."),
    ):
        for name, value in fixed.items():
            if given.get(name, value) != value:
                problem = f"config.json: {where}{name}={given[name]!r} is not supported"
                raise UserError(problem, f"Detrellis has {value!r}.")
    full = {**DEFAULTS, **config}
    recipe = RECIPES[kind]()
    backbone = _backbone(kind, {**BACKBONE_DEFAULTS[kind], **backbone_config})
    sizes = {
        "backbone": backbone,
        "width": full["d_model"],
        "encoder": _projector(kind, full, backbone["patch"]),
        "queries": {"count": full["num_queries"]},
        "cross_attention": {"points": full["decoder_n_points"]},
        "decoder": {
            "layers": full["decoder_layers"],
            "heads": full["decoder_self_attention_heads"],
            "cross_heads": full["decoder_cross_attention_heads"],
            "hidden": full["decoder_ffn_dim"],
        },
        "dropout": float(full.get("dropout", 0.0 if kind == LW else 0.1)),
        "top_k": full["num_queries"],
    }
    detector = DetectorConfig.checked(merged(recipe.detector.model_dump(), sizes))
    assert recipe.schemes.group is not None
    schemes = recipe.schemes.replace(group=recipe.schemes.group.replace(k=full["group_detr"]))
    return recipe.model_copy(
        update={"name": kind.replace("_", "-"), "detector": detector, "schemes": schemes}
    )


def _backbone(kind: str, config: Config) -> dict[str, Any]:
    depth = config["num_hidden_layers"]
    patch = config["patch_size"]
    heads = config["num_attention_heads"]
    outputs = config.get("out_indices") or [
        int(re.sub(r"\D", "", n) or 0) for n in config.get("out_features") or [f"{depth}"]
    ]
    taps = tuple(sorted(int(i) % (depth + 1) for i in outputs))
    size = config["pretrain_image_size" if kind == LW else "image_size"]
    side = config["num_windows"]
    if not all(isinstance(value, int) for value in (size, patch)):
        raise UserError("config.json: an image or patch that is no square is not supported")
    if kind == LW:
        side = round(side**0.5)
        windowed = tuple(sorted(i for i in config["window_block_indices"] if i < max(taps)))
    else:
        windowed = _between(taps)
    layout = {
        "patch": patch,
        "grid": size // patch,
        "windows": side,
        "windowed": windowed,
        "taps": taps,
    }
    drop = float(config.get("drop_path_rate", 0.0))
    return {
        "pretrained": False,
        "width": config["hidden_size"],
        "heads": heads,
        "drop_path": drop,
        **layout,
    }


def _projector(kind: str, full: Config, patch: int) -> dict[str, Any]:
    if kind == RF:
        if full.get("num_feature_levels", 1) != 1:
            raise UserError(
                "config.json: num_feature_levels of more than 1 are not supported",
                "transformers has 1.",
            )
        return {
            "strides": (patch,),
            "blocks": full["c2f_num_blocks"],
            "eps": full.get("layer_norm_eps", 1e-5),
        }
    scales = full.get("projector_scale_factors") or (1.0,)
    strides = tuple(round(patch / scale) for scale in scales)
    return {"strides": strides, "blocks": full["c2f_num_blocks"]}


def kind_of(detector: DetectorConfig) -> str | None:
    """Their model type for a detector; None where it is neither."""
    if detector.encoder.kind != "projector" or detector.backbone.kind != "window_vit":
        return None
    return LW if detector.backbone.style == "cae" else RF


def config_of(recipe: Recipe) -> dict[str, Any]:
    """See `Family`. `UserError` where transformers has no such model."""
    detector = recipe.detector
    kind, backbone, projector = kind_of(detector), detector.backbone, detector.encoder
    assert kind is not None
    assert isinstance(backbone, WindowViTConfig)
    assert isinstance(projector, ProjectorEncoderConfig)
    expected = RECIPES[kind]().detector
    _refuse_unlike(detector, expected)
    assert detector.cross_attention.kind == "deformable"
    config: dict[str, Any] = {
        "d_model": detector.width,
        "c2f_num_blocks": projector.blocks,
        "dropout": detector.dropout,
        "num_queries": detector.queries.count,
        "group_detr": 1,
        "decoder_layers": detector.decoder.layers,
        "decoder_ffn_dim": detector.decoder.hidden,
        "decoder_n_points": detector.cross_attention.points,
        "decoder_self_attention_heads": detector.decoder.heads,
        "decoder_cross_attention_heads": detector.decoder.cross_heads or detector.decoder.heads,
    }
    backbone_config: dict[str, Any] = {
        "hidden_size": backbone.width,
        "num_hidden_layers": max(backbone.taps),
        "num_attention_heads": backbone.heads,
        "patch_size": backbone.patch,
        "out_indices": list(backbone.taps),
    }
    if kind == LW:
        backbone_config |= {
            "model_type": "lw_detr_vit",
            "pretrain_image_size": backbone.grid * backbone.patch,
        }
        backbone_config |= {
            "num_windows": backbone.windows**2,
            "window_block_indices": list(backbone.windowed),
        }
        scales = [backbone.patch / stride for stride in projector.strides]
        return config | {"backbone_config": backbone_config, "projector_scale_factors": scales}
    backbone_config |= {
        "model_type": "rf_detr_dinov2",
        "image_size": backbone.grid * backbone.patch,
    }
    backbone_config |= {"num_windows": backbone.windows, "drop_path_rate": backbone.drop_path}
    backbone_config |= {
        "out_features": [f"stage{i}" for i in backbone.taps],
        "use_mask_token": False,
    }
    return config | {"backbone_config": backbone_config, "layer_norm_eps": projector.eps}


def _refuse_unlike(detector: DetectorConfig, expected: DetectorConfig) -> None:
    """`UserError` for network parts that transformers' models do not have otherwise."""
    for name in UNLIKE:
        ours, theirs = (attrgetter(name)(config) for config in (detector, expected))
        if ours != theirs:
            raise UserError(
                f"this detector cannot be saved for transformers: {name}={ours}, theirs is {theirs}"
            )
    backbone = detector.backbone
    assert isinstance(backbone, WindowViTConfig)
    derived = _between(backbone.taps)
    if backbone.style == "dinov2" and backbone.windowed != derived:
        raise UserError(
            "this detector cannot be saved for transformers: "
            f"backbone.windowed={backbone.windowed}, theirs {derived}"
        )


def _between(taps: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks that attend within windows in RF-DETR: all but those behind a tap."""
    return tuple(i for i in range(max(taps)) if i not in taps)


def _loaded(kind: str, weights: Weights, detector: DetectorConfig, config: Config) -> Loaded:
    given = (
        {lwdetr_names.modern(name): value for name, value in weights.items()}
        if kind == LW
        else weights
    )
    names = lwdetr_names.authors_table if lwdetr_names.is_authors(weights) else lwdetr_names.table
    return Loaded(lwdetr_names.completed(given, detector.queries.count), names(detector))


def _stored(kind: str, weights: Weights, recipe: Recipe, classes: int) -> dict[str, Tensor]:
    kept = lwdetr_names.stored(weights)
    return (
        kept if kind == RF else {lwdetr_names.on_disk(name): value for name, value in kept.items()}
    )


def _family(kind: str, about: str, model: str, processor: str) -> Family:
    names = lwdetr_names.authors_table if kind == RF else lwdetr_names.table
    read, load, store = partial(recipe_of, kind), partial(_loaded, kind), partial(_stored, kind)
    return Family(about, model, processor, read, config_of, load, names, store)


FAMILIES = {
    LW: _family(LW, "LW-DETR", "LwDetrForObjectDetection", "DeformableDetrImageProcessor"),
    RF: _family(RF, "RF-DETR", "RfDetrForObjectDetection", RF_PROCESSOR),
}
