"""transformers' D-FINE: its configuration files. The names of what it holds: `dfine_names.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop.dfine_names import modern, on_disk, table
from detrellis.interop.family import Config, Family, Loaded, Weights
from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.dfine import dfine_l
from detrellis.recipes.overrides import merged

KIND = "d_fine"

# What a file leaves out, where ours read it.
DEFAULTS: dict[str, Any] = {
    "d_model": 256,
    "num_queries": 300,
    "encoder_hidden_dim": 256,
    "encoder_layers": 1,
    "encoder_ffn_dim": 1024,
    "encoder_attention_heads": 8,
    "decoder_layers": 6,
    "decoder_ffn_dim": 1024,
    "decoder_attention_heads": 8,
    "decoder_n_points": 4,
    "num_feature_levels": 3,
    "feat_strides": [8, 16, 32],
    "hidden_expansion": 1.0,
    "depth_mult": 1.0,
    "dropout": 0.0,
    "max_num_bins": 32,
    "reg_scale": 4.0,
    "up": 0.5,
    "positional_encoding_temperature": 10000,
    "freeze_backbone_batch_norms": True,
}
# What changes the network and ours does not have, with the value that ours stands for.
FIXED = {
    "activation_function": "silu",
    "encoder_activation_function": "gelu",
    "decoder_activation_function": "relu",
    "decoder_method": "default",
    "decoder_offset_scale": 0.5,
    "eval_idx": -1,
    "eval_size": None,
    "anchor_image_size": None,
    "layer_scale": 1.0,
    "learn_initial_query": False,
    "lqe_hidden_dim": 64,
    "lqe_layers": 2,
    "top_prob_values": 4,
    "normalize_before": False,
}
# A HGNetV2's stages in the order that timm has them in.
STAGE = (
    *("in_channels", "mid_channels", "out_channels", "num_blocks"),
    *("downsample", "light_block", "kernel_size", "numb_of_layers"),
)


def recipe_of(config: Config) -> Recipe:
    """The recipe that a `config.json` describes: D-FINE's, with the file's sizes."""
    recipe = dfine_l()
    detector = DetectorConfig.checked(merged(recipe.detector.model_dump(), _sizes(config)))
    return recipe.model_copy(update={"name": "dfine", "detector": detector})


def _sizes(config: Config) -> dict[str, Any]:
    """The detector's fields that the file decides."""
    full = DEFAULTS | dict(config)
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(
                f"config.json: {name}={config[name]!r} is not supported",
                f"Detrellis has {value!r}.",
            )
    levels, points = full["num_feature_levels"], full["decoder_n_points"]
    if list(full.get("encode_proj_layers", [levels - 1])) != [levels - 1]:
        raise UserError(
            "config.json: encode_proj_layers is not the last level alone: not supported"
        )
    return {
        "backbone": _backbone(full).model_dump(),
        "width": full["d_model"],
        "encoder": {
            "layers": full["encoder_layers"],
            "heads": full["encoder_attention_heads"],
            "hidden": full["encoder_ffn_dim"],
            "levels": levels,
            "inner": full["encoder_hidden_dim"],
            "blocks": round(3 * full["depth_mult"]),
            "expansion": full["hidden_expansion"],
        },
        "queries": {"count": full["num_queries"]},
        "cross_attention": {"points": points if isinstance(points, int) else tuple(points)},
        "decoder": {
            "layers": full["decoder_layers"],
            "heads": full["decoder_attention_heads"],
            "hidden": full["decoder_ffn_dim"],
            "distributions": {
                "bins": full["max_num_bins"],
                "scale": float(full["reg_scale"]),
                "reach": float(full["up"]),
            },
        },
        "dropout": full["dropout"],
        "position_temperature": float(full["positional_encoding_temperature"]),
        "top_k": full["num_queries"],
    }


def _backbone(config: Config) -> BackboneConfig:
    """timm's name of a HGNetV2 of those sizes."""
    inner = config.get("backbone_config") or {}
    stem, stages = inner.get("stem_channels"), [inner.get(f"stage_{name}") for name in STAGE]
    name = None
    if stem and all(stages):
        rows = [list(row) for row in zip(*stages, strict=True)]
        wanted = {
            "stem_type": "v2",
            "stem_chs": list(stem[1:]),
            **{f"stage{i + 1}": row for i, row in enumerate(rows)},
        }
        name = next((name for name, sizes in hgnets().items() if sizes == wanted), None)
    if name is None or inner.get("use_learnable_affine_block", False) != _affine(name):
        raise UserError(
            f"config.json: backbone_config of stem {stem}, channels "
            f"{inner.get('stage_out_channels')} is not supported",
            "Detrellis reads HGNetV2-B0 to B6, as D-FINE is published with.",
        )
    frozen = config["freeze_backbone_batch_norms"]
    return BackboneConfig(
        name=name,
        pretrained=False,
        norm="frozen" if frozen else "batch",
        frozen="stem" if frozen else 0,
        strides=tuple(config["feat_strides"]),
    )


def hgnets() -> dict[str, dict[str, Any]]:
    """The sizes of timm's HGNetV2s by name."""
    from timm.models import hgnet  # only here: its import takes a second that nobody else needs

    return {name: sizes for name, sizes in hgnet.model_cfgs.items() if name.startswith("hgnetv2")}


def _affine(name: str) -> bool:
    """Whether a HGNetV2 has an affine after each activation: the smaller ones have."""
    return name < "hgnetv2_b4"


def kind_of(detector: DetectorConfig) -> str | None:
    """Their model type for a detector that can only be written as a D-FINE; else None."""
    return None if detector.decoder.distributions is None else KIND


def config_of(recipe: Recipe) -> dict[str, Any]:
    """See `Family`. `UserError` for a network that they have not."""
    detector = recipe.detector
    encoder, decoder, attention = detector.encoder, detector.decoder, detector.cross_attention
    name = (
        detector.backbone.name.split(".")[0]
        if isinstance(detector.backbone, BackboneConfig)
        else "a plain ViT"
    )
    fine = decoder.distributions
    if (
        name not in hgnets()
        or fine is None
        or encoder.kind != "hybrid"
        or attention.kind != "deformable"
    ):
        raise UserError(
            f"this detector cannot be saved for transformers: its D-FINE has a HGNetV2, not {name}"
        )
    levels, inner = encoder.levels, encoder.inner or detector.width
    points = attention.points if isinstance(attention.points, int) else list(attention.points)
    assert isinstance(detector.backbone, BackboneConfig)
    frozen = detector.backbone.normalisation == "frozen"
    channels = _hgnet_config(name, detector.backbone.strides)
    return {
        "d_model": detector.width,
        "num_queries": detector.queries.count,
        "encoder_hidden_dim": inner,
        "encoder_in_channels": channels["stage_out_channels"][-levels:],
        "encoder_layers": encoder.layers,
        "encoder_ffn_dim": encoder.hidden,
        "encoder_attention_heads": encoder.heads,
        "encode_proj_layers": [levels - 1],
        "hidden_expansion": encoder.expansion,
        "depth_mult": encoder.blocks / 3,
        "decoder_in_channels": [inner] * levels,
        "decoder_layers": decoder.layers,
        "decoder_ffn_dim": decoder.hidden,
        "decoder_attention_heads": decoder.heads,
        "decoder_n_points": points,
        "num_feature_levels": levels,
        "feat_strides": list(detector.backbone.strides),
        "max_num_bins": fine.bins,
        "reg_scale": fine.scale,
        "up": fine.reach,
        "dropout": detector.dropout,
        "positional_encoding_temperature": int(detector.position_temperature),
        "freeze_backbone_batch_norms": frozen,
        "num_denoising": 0,  # its table is no part of a detector
        "tie_word_embeddings": False,
        "backbone_config": channels,
        **FIXED,
    }


def _hgnet_config(name: str, strides: tuple[int, ...]) -> dict[str, Any]:
    """Their `backbone_config` for one of timm's HGNetV2s."""
    channels = hgnets()[name]
    stages = zip(*(channels[f"stage{i}"] for i in range(1, 5)), strict=True)
    return {
        "model_type": "hgnet_v2",
        "stem_channels": [3, *channels["stem_chs"]],
        "embedding_size": channels["stem_chs"][-1],
        **{f"stage_{name}": list(values) for name, values in zip(STAGE, stages, strict=True)},
        "hidden_sizes": [channels[f"stage{i}"][2] for i in range(1, 5)],
        "use_learnable_affine_block": _affine(name),
        "out_indices": [stride.bit_length() - 2 for stride in strides],
    }


def constants(detector: DetectorConfig, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of theirs that our recipe holds as numbers,
    or that are none to ours, beside those called `names`.
    """
    fine, attention = detector.decoder.distributions, detector.cross_attention
    assert fine is not None
    assert attention.kind == "deformable"
    assert isinstance(detector.backbone, BackboneConfig)
    points = (
        attention.points
        if isinstance(attention.points, tuple)
        else (attention.points,) * detector.encoder.levels
    )
    shares = torch.tensor([1 / count for count in points for _ in range(count)])
    layers = range(detector.decoder.layers)
    tensors = {
        f"model.decoder.layers.{i}.encoder_attn.num_points_scale": shares.clone() for i in layers
    }
    tensors["model.decoder.up"], tensors["model.decoder.reg_scale"] = (
        torch.tensor([fine.reach]),
        torch.tensor([fine.scale]),
    )
    # Steps that BatchNorm has seen; frozen ones do not count them.
    frozen = "model.backbone." if detector.backbone.normalisation != "batch" else "-"
    norms = (name.removesuffix("running_var") for name in names if name.endswith(".running_var"))
    return tensors | {
        f"{n}num_batches_tracked": torch.tensor(0) for n in norms if not n.startswith(frozen)
    }


def _loaded(weights: Weights, detector: DetectorConfig, config: Config) -> Loaded:
    return Loaded({modern(name): value for name, value in weights.items()}, table(detector))


def _stored(weights: Weights, recipe: Recipe, classes: int) -> dict[str, Tensor]:
    return {
        on_disk(n): value for n, value in {**weights, **constants(recipe.detector, weights)}.items()
    }


FAMILIES = {
    KIND: Family(
        "D-FINE",
        "DFineForObjectDetection",
        "RTDetrImageProcessor",
        recipe_of,
        config_of,
        _loaded,
        table,
        _stored,
        detections=None,
    )
}
