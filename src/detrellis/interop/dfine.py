"""transformers' D-FINE: its configuration files, and names of what a detector holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop.family import Config, Family, Loaded, Weights
from detrellis.interop.links import Pair
from detrellis.interop.names import QKV, feed_forward
from detrellis.interop.rtdetr import csp, hybrid_levels, normed
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
    found = hgnets()[name]
    stages = zip(*(found[f"stage{i}"] for i in range(1, 5)), strict=True)
    return {
        "model_type": "hgnet_v2",
        "stem_channels": [3, *found["stem_chs"]],
        "embedding_size": found["stem_chs"][-1],
        **{f"stage_{name}": list(values) for name, values in zip(STAGE, stages, strict=True)},
        "hidden_sizes": [found[f"stage{i}"][2] for i in range(1, 5)],
        "use_learnable_affine_block": _affine(name),
        "out_indices": [stride.bit_length() - 2 for stride in strides],
    }


def constants(detector: DetectorConfig, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of theirs that our recipe holds as numbers, or that are none to ours, beside those
    called `names`.
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
    found = {
        f"model.decoder.layers.{i}.encoder_attn.num_points_scale": shares.clone() for i in layers
    }
    found["model.decoder.up"], found["model.decoder.reg_scale"] = (
        torch.tensor([fine.reach]),
        torch.tensor([fine.scale]),
    )
    # Steps that BatchNorm has seen; frozen ones do not count them.
    frozen = "model.backbone." if detector.backbone.normalisation != "batch" else "-"
    norms = (name.removesuffix("running_var") for name in names if name.endswith(".running_var"))
    return found | {
        f"{n}num_batches_tracked": torch.tensor(0) for n in norms if not n.startswith(frozen)
    }


def modern(name: str) -> str:
    """A name on disk as transformers calls it in memory; one in memory stays as it is."""
    name = name.replace("model.encoder.encoder.", "model.encoder.aifi.").replace(
        ".self_attn.out_proj.", ".self_attn.o_proj."
    )
    return re.sub(
        r"(layers\.\d+)\.fc([12])\.", lambda m: f"{m[1]}.mlp.layers.{int(m[2]) - 1}.", name
    )


def on_disk(name: str) -> str:
    """The inverse of `modern`."""
    name = name.replace("model.encoder.aifi.", "model.encoder.encoder.").replace(
        ".self_attn.o_proj.", ".self_attn.out_proj."
    )
    return re.sub(
        r"(layers\.\d+)\.mlp\.layers\.([01])\.", lambda m: f"{m[1]}.fc{int(m[2]) + 1}.", name
    )


MLP = ("mlp.layers.0", "mlp.layers.1")
# timm's names of the parts of a HGNetV2's layers, and theirs.
HGNET = {"conv": "convolution", "bn": "normalization", "lab": "lab"}
LEAVES = {
    "conv": ("weight",),
    "bn": ("weight", "bias", "running_mean", "running_var"),
    "lab": ("scale", "bias"),
}


def table(config: DetectorConfig) -> list[Pair]:
    """Names in memory, which `modern` makes of those on disk."""
    layer = "model.decoder.layers.*"
    return [
        *_hgnet("model.backbone.model"),
        *_hybrid(config),
        Pair("queries.head.projection", "model.enc_output.0"),
        Pair("queries.head.norm", "model.enc_output.1"),
        Pair("queries.head.classify", "model.enc_score_head"),
        Pair("queries.head.move.@", "model.enc_bbox_head.@"),
        Pair("decoder.position.mlp.@", "model.decoder.query_pos_head.@"),
        Pair("decoder.layers.*.self_attention.projections", f"{layer}.self_attn.{QKV}"),
        Pair("decoder.layers.*.self_attention.output", f"{layer}.self_attn.o_proj"),
        Pair(
            "decoder.layers.*.cross_attention.sampling_offsets",
            f"{layer}.encoder_attn.sampling_offsets",
        ),
        Pair(
            "decoder.layers.*.cross_attention.attention_weights",
            f"{layer}.encoder_attn.attention_weights",
        ),
        Pair("decoder.layers.*.norm_self", f"{layer}.self_attn_layer_norm"),
        Pair("decoder.layers.*.gateway.gate", f"{layer}.gateway.gate"),
        Pair("decoder.layers.*.gateway.norm", f"{layer}.gateway.norm"),
        *feed_forward("decoder.layers.*", layer, "final_layer_norm", MLP),
        Pair("decoder.heads.initial_box.@", "model.decoder.pre_bbox_head.@"),
        Pair("decoder.heads.classes.*", "model.decoder.class_embed.*|class_embed.*"),
        *(
            Pair(
                f"decoder.heads.boxes.*.layers.{k}",
                f"model.decoder.bbox_embed.*.layers.{k}|bbox_embed.*.layers.{k}",
            )
            for k in range(3)
        ),
        *(
            Pair(
                f"decoder.heads.qualities.*.mlp.layers.{k}",
                f"model.decoder.lqe_layers.*.reg_conf.layers.{k}",
            )
            for k in range(2)
        ),
    ]


def _hybrid(config: DetectorConfig) -> list[Pair]:
    """The neck: RT-DETR's, with other fusions."""
    aifi = "model.encoder.aifi.0.layers.*"
    rows = [*hybrid_levels(), *feed_forward("neck.layers.*", aifi, "final_layer_norm", MLP)]
    for i in range(len(config.backbone.strides) - 1):
        for part in (0, 1):
            rows += normed(
                f"neck.downs.{i}.{part}", f"model.encoder.downsample_convs.{i}.conv{part + 1}"
            )
        for way, blocks in (("top_down", "fpn_blocks"), ("bottom_up", "pan_blocks")):
            ours, theirs = f"neck.{way}.{i}", f"model.encoder.{blocks}.{i}"
            rows += [
                *normed(f"{ours}.first", f"{theirs}.conv1"),
                *normed(f"{ours}.last", f"{theirs}.conv4"),
            ]
            for step in (0, 1):
                our_step, their_step = f"{ours}.steps.{step}", f"{theirs}.csp_rep{step + 1}"
                rows += [
                    *csp(f"{our_step}.0", their_step),
                    *normed(f"{our_step}.1", f"{theirs}.conv{step + 2}"),
                ]
    return rows


def _hgnet(prefix: str) -> list[Pair]:
    """timm's HGNetV2, every layer of which has the same three parts."""
    places = {"backbone.model.stem": f"{prefix}.embedder"}
    places |= {f"backbone.model.stages_{s}": f"{prefix}.encoder.stages.{s}" for s in range(4)}
    return [
        Pair(f"{ours}.@.{part}.{leaf}", f"{theirs}.@.{HGNET[part]}.{leaf}")
        for ours, theirs in places.items()
        for part, leaves in LEAVES.items()
        for leaf in leaves
    ]


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
