"""The authors' checkpoints of RT-DETR and RT-DETRv2:
which network a state dict holds, and its names.

The first version has numbers where the second and D-FINE have names (`named`). How many decoder
layers are evaluated (three of six, in the smaller one of two with a ResNet-50-vd) stands in no
file: all that are there run.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop import rtdetr
from detrellis.interop.family import Config, Loaded, Repository, Weights
from detrellis.interop.links import Pair
from detrellis.interop.names import feed_forward, packed, sampling
from detrellis.interop.rtdetr import csp, normed
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig

CLASSES = "decoder.dec_score_head.0.weight"
MARKER = "backbone.conv1.conv1_1.conv.weight"
POINTS = "decoder.decoder.layers.0.cross_attn.num_points_scale"  # of the second version
HEADS = 8  # in all published files; no shape tells
# The first version's numbers, and the second one's names.
PLACES = (
    (re.compile(r"^(encoder\.input_proj\.\d+)\.0\."), r"\1.conv."),
    (re.compile(r"^(encoder\.input_proj\.\d+)\.1\."), r"\1.norm."),
    (re.compile(r"^decoder\.enc_output\.0\."), "decoder.enc_output.proj."),
    (re.compile(r"^decoder\.enc_output\.1\."), "decoder.enc_output.norm."),
)


def recipe_of(weights: Weights, arguments: Config) -> Recipe:
    """The recipe of the depth that a state dict holds, with the dict's sizes:
    those of a `config.json` like it.
    """
    weights = named(weights)
    layer, csp_layer = "encoder.encoder.0.layers", "encoder.fpn_blocks.0"
    inner = weights["encoder.input_proj.0.conv.weight"].shape[0]
    levels, layers = count(weights, "decoder.input_proj"), count(weights, "decoder.decoder.layers")
    rows = weights["decoder.decoder.layers.0.cross_attn.attention_weights.weight"].shape[0] // HEADS
    config: dict[str, Any] = {
        "backbone_config": _backbone(weights),
        "d_model": weights["decoder.enc_output.proj.weight"].shape[0],
        "encoder_hidden_dim": inner,
        "encoder_layers": count(weights, layer),
        "encoder_ffn_dim": weights[f"{layer}.0.linear1.weight"].shape[0],
        "hidden_expansion": weights[f"{csp_layer}.conv1.conv.weight"].shape[0] / inner,
        "decoder_layers": layers,
        "decoder_ffn_dim": weights["decoder.decoder.layers.0.linear1.weight"].shape[0],
        "decoder_n_points": rows // levels,
        "num_feature_levels": levels,
    }
    if POINTS in weights:
        counts = points(weights[POINTS], levels)
        config["decoder_n_points"] = counts[0] if len(set(counts)) == 1 else counts
    recipe = rtdetr.recipe_of("rt_detr_v2" if POINTS in weights else "rt_detr", config)
    encoder = recipe.detector.encoder.model_copy(
        update={"blocks": count(weights, f"{csp_layer}.bottlenecks")}
    )
    return recipe.model_copy(update={"detector": recipe.detector.replace(encoder=encoder)})


def class_count(weights: Weights, detector: DetectorConfig) -> int:
    """Classes that the weights distinguish."""
    return weights[CLASSES].shape[0]


def count(weights: Weights, prefix: str) -> int:
    """How many numbers follow the prefix."""
    start = prefix + "."
    return len(
        {name.removeprefix(start).split(".")[0] for name in weights if name.startswith(start)}
    )


def points(shares: Tensor, levels: int) -> tuple[int, ...]:
    """Points of each level, of which each has 1 in so many as its share."""
    counts, rest = [], [round(1 / share) for share in shares.tolist()]
    while rest:
        counts.append(rest[0])
        rest = rest[rest[0] :]
    if len(counts) != levels:
        raise UserError(
            f"its attention samples {counts} points on {levels} levels",
            "Take another copy of the file.",
        )
    return tuple(counts)


def _backbone(weights: Weights) -> dict[str, Any]:
    stages = [f"backbone.res_layers.{stage}.blocks" for stage in range(4)]
    kind = "bottleneck" if f"{stages[0]}.0.branch2c.conv.weight" in weights else "basic"
    last = "branch2c" if kind == "bottleneck" else "branch2b"
    return {
        "layer_type": kind,
        "depths": [count(weights, stage) for stage in stages],
        "hidden_sizes": [weights[f"{stage}.0.{last}.conv.weight"].shape[0] for stage in stages],
        "embedding_size": weights["backbone.conv1.conv1_3.conv.weight"].shape[0],
    }


def named(weights: Weights) -> dict[str, Tensor]:
    """The weights of either version as the second one calls them."""
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        for pattern, place in PLACES:
            name = pattern.sub(place, name)
        tensors[name] = value
    return tensors


def table(config: DetectorConfig) -> list[Pair]:
    """The names of the second version."""
    layer = "decoder.decoder.layers.*"
    rows = [
        *_resnet_vd(),
        *shared_table(config),
        Pair("decoder.layers.*.norm_cross", f"{layer}.norm2"),
        Pair("decoder.layers.*.cross_attention.value_projection", f"{layer}.cross_attn.value_proj"),
        Pair(
            "decoder.layers.*.cross_attention.output_projection", f"{layer}.cross_attn.output_proj"
        ),
        *normed("neck.downs.*", "encoder.downsample_convs.*"),
    ]
    for i in range(len(config.backbone.strides) - 1):
        rows += csp(f"neck.top_down.{i}", f"encoder.fpn_blocks.{i}")
        rows += csp(f"neck.bottom_up.{i}", f"encoder.pan_blocks.{i}")
    return rows


def shared_table(config: DetectorConfig) -> list[Pair]:
    """What D-FINE's code calls alike:
    all but the backbone, the fusions, and what follows attention.
    """
    layer, aifi = "decoder.decoder.layers.*", "encoder.encoder.0.layers.*"
    return [
        *packed("neck.layers.*.attention", f"{aifi}.self_attn"),
        Pair("neck.layers.*.norm", f"{aifi}.norm1"),
        *feed_forward("neck.layers.*", aifi, "norm2"),
        *normed("neck.projections.*", "encoder.input_proj.*"),
        *normed("neck.outputs.*", "decoder.input_proj.*"),
        *normed("neck.laterals.*", "encoder.lateral_convs.*"),
        Pair("queries.head.projection", "decoder.enc_output.proj"),
        Pair("queries.head.norm", "decoder.enc_output.norm"),
        Pair("queries.head.classify", "decoder.enc_score_head"),
        Pair("queries.head.move.@", "decoder.enc_bbox_head.@"),
        Pair("decoder.position.mlp.@", "decoder.query_pos_head.@"),
        *packed("decoder.layers.*.self_attention", f"{layer}.self_attn"),
        Pair("decoder.layers.*.norm_self", f"{layer}.norm1"),
        *sampling("decoder.layers.*.cross_attention", f"{layer}.cross_attn")[:2],
        *feed_forward("decoder.layers.*", layer, "norm3"),
        Pair("decoder.heads.classes.*", "decoder.dec_score_head.*"),
        *(
            Pair(f"decoder.heads.boxes.*.layers.{k}", f"decoder.dec_bbox_head.*.layers.{k}")
            for k in range(3)
        ),
    ]


def _resnet_vd() -> list[Pair]:
    stem = "backbone.conv1.conv1_{}"
    norms = ("backbone.stem.0.1", "backbone.stem.0.4", "backbone.stem.1")
    rows = [Pair(f"backbone.stem.0.{3 * k}", stem.format(k + 1) + ".conv") for k in range(3)]
    rows += [Pair(norm, stem.format(k + 1) + ".norm") for k, norm in enumerate(norms)]
    for stage in range(4):
        ours = f"backbone.stages.layer{stage + 1}.*"
        theirs = f"backbone.res_layers.{stage}.blocks.*"
        for k, branch in enumerate("abc", start=1):
            rows.append(Pair(f"{ours}.conv{k}", f"{theirs}.branch2{branch}.conv"))
            rows.append(Pair(f"{ours}.bn{k}", f"{theirs}.branch2{branch}.norm"))
        shortcut = f"{theirs}.short" + (".conv" if stage else "")  # behind the pooling
        rows += [
            Pair(f"{ours}.downsample.{1 + i}", f"{shortcut}.{part}")
            for i, part in enumerate(("conv", "norm"))
        ]
    return rows


REPOSITORY = Repository(
    "RT-DETR and RT-DETRv2",
    lambda weights: MARKER in weights and CLASSES in weights,
    recipe_of,
    class_count,
    lambda weights, detector: Loaded(named(weights), table(detector)),
)
