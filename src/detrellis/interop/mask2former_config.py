"""Mask2Former's sizes: of transformers' configuration and back, and of its own code's weights.

| where their codes and ours differ | ours |
| --- | --- |
| padding of a batch is read as if it were image, in both | nobody reads it |
| pictures are padded to a multiple of 32, in both | as they are; in sides of such multiples all is equal |
| transformers' `post_process_instance_segmentation` thresholds masks at 384x384 | Mask2Former's own inference |
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop import mask2former, swin
from detrellis.interop.detr import BLOCKS, resnet_of
from detrellis.interop.family import Config, Family, Loaded, Weights
from detrellis.recipes.backbones import RESNETS, BackboneConfig
from detrellis.recipes.config import Recipe
from detrellis.recipes.data import DataConfig
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.mask2former import mask2former_detector, mask2former_r50
from detrellis.recipes.overrides import merged

KIND = "mask2former"
# Their defaults, where a file leaves something out.
DEFAULTS: dict[str, Any] = {
    "feature_size": 256,
    "mask_feature_size": 256,
    "hidden_dim": 256,
    "encoder_feedforward_dim": 1024,
    "activation_function": "relu",
    "encoder_layers": 6,
    "decoder_layers": 10,
    "num_attention_heads": 8,
    "dropout": 0.0,
    "dim_feedforward": 2048,
    "enforce_input_projection": False,
    "num_queries": 100,
    "train_num_points": 12544,
    "no_object_weight": 0.1,
    "class_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 5.0,
}
FIXED = {
    "pre_norm": False,
    "common_stride": 4,
    "feature_strides": [4, 8, 16, 32],
    "oversample_ratio": 3.0,
    "importance_sample_ratio": 0.75,
    "activation_function": "relu",
    "dropout": 0.0,
}
LOSSES = {
    "no_object": "no_object_weight",
    "classes": "class_weight",
    "mask": "mask_weight",
    "dice": "dice_weight",
    "points": "train_num_points",
}


def recipe_of(config: Config) -> Recipe:
    """The recipe that a `config.json` describes."""
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(
                f"config.json: {name}={config[name]!r} is not supported",
                f"Detrellis has {value!r}.",
            )
    full = {**DEFAULTS, **config}
    backbone_config = full.get("backbone_config") or {}
    if backbone_config.get("model_type", "swin") not in ("resnet", "swin"):
        raise UserError(
            f"config.json: backbone_config.model_type={backbone_config['model_type']!r} is not "
            "supported",
            "With Mask2Former Detrellis reads transformers' own resnet and swin.",
        )
    resnet = backbone_config.get("model_type") == "resnet"
    backbone = (
        resnet_of(full, several=True)
        if resnet
        else BackboneConfig(name=swin.checked(backbone_config))
    )
    sizes = {
        "width": full["hidden_dim"],
        "encoder": {
            "width": None if full["feature_size"] == full["hidden_dim"] else full["feature_size"],
            "heads": full["num_attention_heads"],
            "hidden": full["encoder_feedforward_dim"],
            "layers": full["encoder_layers"],
        },
        "cross_attention": {"project": full["enforce_input_projection"]},
        "decoder": {
            "heads": full["num_attention_heads"],
            "hidden": full["dim_feedforward"],
            "layers": full["decoder_layers"] - 1,  # theirs counts outputs
        },
        "queries": {"count": full["num_queries"]},
        "masks": {"width": full["mask_feature_size"]},
    }
    losses = {ours: full[theirs] for ours, theirs in LOSSES.items()}
    costs = {
        "cost_classes": losses["classes"],
        "cost_mask": losses["mask"],
        "cost_dice": losses["dice"],
    }
    recipe = _recipe(backbone, sizes)
    return recipe.model_copy(update={"loss": recipe.loss.replace(**losses, **costs)})


def _recipe(backbone: BackboneConfig, sizes: dict[str, Any]) -> Recipe:
    """Mask2Former of these sizes; its backbone's weights come with the file."""
    ready = backbone.replace(pretrained=False, norm="frozen_norm", strides=(8, 16, 32))
    detector = DetectorConfig.checked(merged(mask2former_detector(ready).model_dump(), sizes))
    return mask2former_r50().model_copy(
        update={"name": KIND, "detector": detector, "data": DataConfig()}
    )


def kind_of(detector: DetectorConfig) -> str | None:
    """Their model type for a detector that predicts masks alone; else None."""
    return None if detector.boxes else KIND


def config_of(recipe: Recipe) -> dict[str, Any]:
    """See `Family`."""
    detector, loss = recipe.detector, recipe.loss
    assert detector.masks is not None
    assert detector.cross_attention.kind == "masked"
    assert detector.encoder.kind == "deformable"
    backbone = detector.backbone
    assert isinstance(backbone, BackboneConfig)
    of_backbone = (
        _resnet(backbone.name) if backbone.name in RESNETS else swin.config_of(backbone.name)
    )
    usual = detector.encoder.heads == detector.decoder.heads and detector.encoder.levels == 3
    if not usual or len(backbone.strides) != 3 or detector.dropout or detector.activation != "relu":
        raise UserError(
            "this detector cannot be saved for transformers: its Mask2Former has equally many "
            "heads in encoder and decoder, three levels, all of them of the backbone, ReLU, and "
            "no dropout"
        )
    losses = {theirs: getattr(loss, ours) for ours, theirs in LOSSES.items()}
    return losses | {
        "hidden_dim": detector.width,
        "feature_size": detector.memory_width,
        "mask_feature_size": detector.masks.width,
        "num_attention_heads": detector.decoder.heads,
        "encoder_feedforward_dim": detector.encoder.hidden,
        "encoder_layers": detector.encoder.layers,
        "dim_feedforward": detector.decoder.hidden,
        "decoder_layers": detector.decoder.layers + 1,
        "enforce_input_projection": detector.cross_attention.project,
        "num_queries": detector.queries.count,
        "dropout": 0.0,
        "backbone_config": of_backbone,
    }


def _resnet(name: str) -> dict[str, Any]:
    kind, depths = next(blocks for blocks, known in BLOCKS.items() if known == name)
    sizes = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    shape = {
        "layer_type": kind,
        "depths": list(depths),
        "hidden_sizes": sizes,
        "embedding_size": 64,
    }
    return {"model_type": "resnet", **shape, "out_features": [f"stage{i}" for i in range(1, 5)]}


PROCESSOR = {
    "format": None,
    "size_divisor": 32,
    "ignore_index": 255,
    "do_reduce_labels": False,
}
_PREDICTOR, _PIXEL = "sem_seg_head.predictor", "sem_seg_head.pixel_decoder"


def is_mask2former(weights: Weights) -> bool:
    """Whether the names are those of Mask2Former's own code."""
    return f"{_PREDICTOR}.query_embed.weight" in weights


def recipe_of_weights(weights: Weights) -> Recipe:
    """The recipe of the weights of Mask2Former's own code, with 8 heads:
    no shape tells their number.
    """
    if f"{_PIXEL}.adapter_1.weight" not in weights:
        raise UserError(
            "its pixel decoder is not the one of deformable attention",
            "Take a checkpoint of another.",
        )

    def rows(name: str) -> int:
        return weights[name].shape[0]

    count = partial(pattern_count, weights)
    width = rows(f"{_PREDICTOR}.decoder_norm.weight")
    memory = rows(f"{_PIXEL}.adapter_1.norm.weight")
    linear = "linear1.weight"
    sizes = {
        "width": width,
        "encoder": {
            "width": None if memory == width else memory,
            "hidden": rows(f"{_PIXEL}.transformer.encoder.layers.0.{linear}"),
            "layers": count(rf"{re.escape(_PIXEL)}\.transformer\.encoder\.layers\.(\d+)\."),
        },
        "cross_attention": {"project": f"{_PREDICTOR}.input_proj.0.weight" in weights},
        "decoder": {
            "hidden": rows(f"{_PREDICTOR}.transformer_ffn_layers.0.{linear}"),
            "layers": count(rf"{re.escape(_PREDICTOR)}\.transformer_ffn_layers\.(\d+)\."),
        },
        "queries": {"count": rows(f"{_PREDICTOR}.query_embed.weight")},
        "masks": {"width": rows(f"{_PIXEL}.mask_features.weight")},
    }
    return _recipe(backbone_of(weights), sizes)


def class_count(weights: Weights) -> int:
    """Classes that the weights distinguish, without "no object"."""
    return weights[f"{_PREDICTOR}.class_embed.weight"].shape[0] - 1


def pattern_count(weights: Weights, pattern: str) -> int:
    """How many different first groups of the pattern the names begin with."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def backbone_of(weights: Weights) -> BackboneConfig:
    """The ResNet or Swin of detectron2's names."""
    count = partial(pattern_count, weights)
    if "backbone.patch_embed.proj.weight" in weights:
        depths = tuple(count(rf"backbone\.layers\.{i}\.blocks\.(\d+)\.") for i in swin.STAGES)
        first = weights["backbone.layers.0.blocks.0.attn.relative_position_bias_table"].shape[0]
        window = (round(first**0.5) + 1) // 2
        return BackboneConfig(
            name=swin.name_of(weights["backbone.patch_embed.proj.weight"].shape[0], depths, window)
        )
    depths = tuple(count(rf"backbone\.res{stage}\.(\d+)\.") for stage in (2, 3, 4, 5))
    names = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}
    if depths not in names:
        raise UserError(
            f"the backbone has {list(depths)} blocks a stage: ResNet-50, 101 and Swins are "
            "supported"
        )
    return BackboneConfig(name=names[depths])


def _loaded(weights: Weights, detector: DetectorConfig, config: Config) -> Loaded:
    return Loaded(mask2former.as_linear(weights), mask2former.huggingface(detector))


def _stored(weights: Weights, recipe: Recipe, classes: int) -> dict[str, Tensor]:
    return mask2former.as_convolutions(weights) | mask2former.constants(recipe, classes)


FAMILIES = {
    KIND: Family(
        "Mask2Former",
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerImageProcessor",
        recipe_of,
        config_of,
        _loaded,
        mask2former.huggingface,
        _stored,
        pictures=PROCESSOR,
    )
}
