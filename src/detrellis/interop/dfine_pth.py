"""D-FINE's own checkpoints: which network a state dict holds, and its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop.dfine import LEAVES, hgnets
from detrellis.interop.links import Pair
from detrellis.recipes.detector import BackboneConfig, DetectorConfig

Weights = Mapping[str, Tensor]
MARKER = "decoder.pre_bbox_head.layers.0.weight"
CLASSES = "decoder.dec_score_head.0.weight"


def sizes(weights: Weights) -> dict[str, Any]:
    """The detector's fields that shapes decide; heads are 8 and queries 300 in all published files."""
    layer, attention = "encoder.encoder.0.layers", "decoder.decoder.layers.0.cross_attn"
    levels, inner = _count(weights, "encoder.input_proj"), weights["encoder.input_proj.0.conv.weight"].shape[0]
    csp = "encoder.fpn_blocks.0.cv2.0"
    return {
        "backbone": _backbone(weights, levels).model_dump(),
        "width": weights["decoder.enc_output.proj.weight"].shape[0],
        "encoder": {
            "layers": _count(weights, layer),
            "hidden": weights[f"{layer}.0.linear1.weight"].shape[0],
            "levels": levels,
            "inner": inner,
            "blocks": _count(weights, f"{csp}.bottlenecks"),
            "expansion": 2 * weights[f"{csp}.conv1.conv.weight"].shape[0] / inner,
        },
        "cross_attention": {"points": _points(weights[f"{attention}.num_points_scale"], levels)},
        "decoder": {
            "layers": _count(weights, "decoder.decoder.layers"),
            "hidden": weights["decoder.decoder.layers.0.linear1.weight"].shape[0],
            "distributions": {
                "bins": weights["decoder.dec_bbox_head.0.layers.2.weight"].shape[0] // 4 - 1,
                "scale": abs(float(weights["decoder.reg_scale"])),
                "reach": abs(float(weights["decoder.up"])),
            },
        },
    }


def _count(weights: Weights, prefix: str) -> int:
    """How many numbers follow the prefix."""
    start = prefix + "."
    return len({name.removeprefix(start).split(".")[0] for name in weights if name.startswith(start)})


def _points(shares: Tensor, levels: int) -> tuple[int, ...]:
    """Points of each level, of which each has 1 in so many as its share."""
    counts, rest = [], [round(1 / share) for share in shares.tolist()]
    while rest:
        counts.append(rest[0])
        rest = rest[rest[0] :]
    if len(counts) != levels:
        raise UserError(f"its attention samples {counts} points on {levels} levels", "Take another copy of the file.")
    return tuple(counts)


def _backbone(weights: Weights, levels: int) -> BackboneConfig:
    """timm's name of a HGNetV2 of those shapes."""
    stem = [weights[f"backbone.stem.{part}.conv.weight"].shape[0] for part in ("stem1", "stem4")]
    stages = []
    for stage in range(4):
        blocks = f"backbone.stages.{stage}.blocks"
        channels = weights[f"{blocks}.0.aggregation.1.conv.weight"].shape[0]
        stages.append((channels, _count(weights, blocks), _count(weights, f"{blocks}.0.layers")))
    shapes = (2, 3, 7)  # of a stage in timm's rows: channels, blocks, layers of a block
    known = {
        (*found["stem_chs"], *(tuple(found[f"stage{i}"][k] for k in shapes) for i in range(1, 5))): name
        for name, found in hgnets().items()
    }
    name = known.get((*stem, *stages))
    if name is None:
        raise UserError(f"the backbone has a stem of {stem} and stages of {stages}: only HGNetV2s are supported")
    frozen = "backbone.stem.stem1.bn.num_batches_tracked" not in weights  # as in the two larger ones
    strides = (8, 16, 32)[-levels:]
    if frozen:
        return BackboneConfig(name=name, pretrained=False, norm="frozen", frozen="stem", strides=strides)
    return BackboneConfig(name=name, pretrained=False, norm="batch", strides=strides)


def table(config: DetectorConfig) -> list[Pair]:
    """The authors' names."""
    layer, aifi = "decoder.decoder.layers.*", "encoder.encoder.0.layers.*"
    rows = [
        *_hgnet(),
        *_packed("neck.layers.*.attention", f"{aifi}.self_attn"),
        Pair("neck.layers.*.norm", f"{aifi}.norm1"),
        *_feed_forward("neck.layers.*.feed_forward", aifi, "norm2"),
        *_normed("neck.projections.*", "encoder.input_proj.*"),
        *_normed("neck.outputs.*", "decoder.input_proj.*"),
        *_normed("neck.laterals.*", "encoder.lateral_convs.*"),
        Pair("queries.head.projection", "decoder.enc_output.proj"),
        Pair("queries.head.norm", "decoder.enc_output.norm"),
        Pair("queries.head.classify", "decoder.enc_score_head"),
        Pair("queries.head.move.@", "decoder.enc_bbox_head.@"),
        Pair("decoder.position.mlp.@", "decoder.query_pos_head.@"),
        *_packed("decoder.layers.*.self_attention", f"{layer}.self_attn"),
        Pair("decoder.layers.*.norm_self", f"{layer}.norm1"),
        Pair("decoder.layers.*.cross_attention.sampling_offsets", f"{layer}.cross_attn.sampling_offsets"),
        Pair("decoder.layers.*.cross_attention.attention_weights", f"{layer}.cross_attn.attention_weights"),
        Pair("decoder.layers.*.gateway.gate", f"{layer}.gateway.gate"),
        Pair("decoder.layers.*.gateway.norm", f"{layer}.gateway.norm"),
        *_feed_forward("decoder.layers.*.feed_forward", layer, "norm3"),
        Pair("decoder.heads.initial_box.@", "decoder.pre_bbox_head.@"),
        Pair("decoder.heads.classes.*", "decoder.dec_score_head.*"),
        *(Pair(f"decoder.heads.boxes.*.layers.{k}", f"decoder.dec_bbox_head.*.layers.{k}") for k in range(3)),
        *(
            Pair(f"decoder.heads.qualities.*.mlp.layers.{k}", f"decoder.decoder.lqe_layers.*.reg_conf.layers.{k}")
            for k in range(2)
        ),
    ]
    for i in range(len(config.backbone.strides) - 1):
        for part in (0, 1):
            rows += _normed(f"neck.downs.{i}.{part}", f"encoder.downsample_convs.{i}.0.cv{part + 1}")
        rows += _fusion(f"neck.top_down.{i}", f"encoder.fpn_blocks.{i}")
        rows += _fusion(f"neck.bottom_up.{i}", f"encoder.pan_blocks.{i}")
    return rows


def _fusion(ours: str, theirs: str) -> list[Pair]:
    rows = [*_normed(f"{ours}.first", f"{theirs}.cv1"), *_normed(f"{ours}.last", f"{theirs}.cv4")]
    for step in (0, 1):
        own, other = f"{ours}.steps.{step}", f"{theirs}.cv{step + 2}"
        rows += _normed(f"{own}.1", f"{other}.1")
        for part, name in (("first", "conv1"), ("bypass", "conv2"), ("last", "conv3")):
            rows += _normed(f"{own}.0.{part}", f"{other}.0.{name}")
        for part, name in (("wide", "conv1"), ("point", "conv2")):
            rows += _normed(f"{own}.0.blocks.*.{part}", f"{other}.0.bottlenecks.*.{name}")
    return rows


def _normed(ours: str, theirs: str) -> list[Pair]:
    return [Pair(f"{ours}.convolution", f"{theirs}.conv"), Pair(f"{ours}.norm", f"{theirs}.norm")]


def _packed(ours: str, theirs: str) -> list[Pair]:
    joined = [Pair(f"{ours}.projections.{kind}", f"{theirs}.in_proj_{kind}") for kind in ("weight", "bias")]
    return [*joined, Pair(f"{ours}.output", f"{theirs}.out_proj")]


def _feed_forward(ours: str, theirs: str, norm: str) -> list[Pair]:
    names = {"inner": "linear1", "outer": "linear2", "norm": norm}
    return [Pair(f"{ours}.{own}", f"{theirs}.{other}") for own, other in names.items()]


def _hgnet() -> list[Pair]:
    """timm's names, but for the stages'."""
    places = {f"backbone.model.stages_{stage}": f"backbone.stages.{stage}" for stage in range(4)}
    places["backbone.model.stem"] = "backbone.stem"
    return [
        Pair(f"{ours}.@.{part}.{leaf}", f"{theirs}.@.{part}.{leaf}")
        for ours, theirs in places.items()
        for part, leaves in LEAVES.items()
        for leaf in leaves
    ]
