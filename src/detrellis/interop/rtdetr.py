"""transformers' RT-DETR and RT-DETRv2: configuration files, and names of what a detector holds."""

from __future__ import annotations

from detrellis.interop.links import Pair
from detrellis.interop.names import QKV, sampling
from detrellis.recipes.detector import DetectorConfig


def table(config: DetectorConfig) -> list[Pair]:
    """Names in memory, which `modern` makes of those on disk."""
    return [
        *_resnet_vd("model.backbone.model"),
        *_hybrid(config),
        Pair("queries.head.projection", "model.enc_output.0"),
        Pair("queries.head.norm", "model.enc_output.1"),
        Pair("queries.head.classify", "model.enc_score_head"),
        Pair("queries.head.move.@", "model.enc_bbox_head.@"),
        Pair("decoder.position.mlp.@", "model.decoder.query_pos_head.@"),
        Pair("decoder.layers.*.self_attention.projections", f"model.decoder.layers.*.self_attn.{QKV}"),
        Pair("decoder.layers.*.self_attention.output", "model.decoder.layers.*.self_attn.o_proj"),
        *sampling("decoder.layers.*.cross_attention", "model.decoder.layers.*.encoder_attn"),
        Pair("decoder.layers.*.norm_self", "model.decoder.layers.*.self_attn_layer_norm"),
        Pair("decoder.layers.*.norm_cross", "model.decoder.layers.*.encoder_attn_layer_norm"),
        *_feed_forward("decoder.layers.*.feed_forward", "model.decoder.layers.*"),
        Pair("decoder.heads.classes.*", "model.decoder.class_embed.*|class_embed.*"),
        *(
            Pair(f"decoder.heads.boxes.*.layers.{k}", f"model.decoder.bbox_embed.*.layers.{k}|bbox_embed.*.layers.{k}")
            for k in range(3)
        ),
    ]


def _feed_forward(ours: str, theirs: str) -> list[Pair]:
    return [
        Pair(f"{ours}.inner", f"{theirs}.mlp.fc1"),
        Pair(f"{ours}.outer", f"{theirs}.mlp.fc2"),
        Pair(f"{ours}.norm", f"{theirs}.final_layer_norm"),
    ]


def _hybrid(config: DetectorConfig) -> list[Pair]:
    """The neck; AIFI's one map is the coarsest."""
    rows = [
        *hybrid_levels(),
        *_feed_forward("neck.layers.*.feed_forward", "model.encoder.aifi.0.layers.*"),
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
    for own, other in (("first", "conv1"), ("bypass", "conv2"), ("last", "conv3")):
        rows += normed(f"{ours}.{own}", f"{theirs}.{other}")
    for own, other in (("wide", "conv1"), ("point", "conv2")):
        rows += normed(f"{ours}.blocks.*.{own}", f"{theirs}.bottlenecks.*.{other}")
    return rows


def normed(ours: str, theirs: str, parts: tuple[str, str] = ("conv", "norm")) -> list[Pair]:
    """A convolution and its norm."""
    return [Pair(f"{ours}.convolution", f"{theirs}.{parts[0]}"), Pair(f"{ours}.norm", f"{theirs}.{parts[1]}")]


def _resnet_vd(prefix: str) -> list[Pair]:
    parts = ("convolution", "normalization")
    stem = f"{prefix}.embedder.embedder"
    norms = ("backbone.stem.0.1", "backbone.stem.0.4", "backbone.stem.1")
    rows = [Pair(f"backbone.stem.0.{3 * k}", f"{stem}.{k}.{parts[0]}") for k in range(3)]
    rows += [Pair(norm, f"{stem}.{k}.{parts[1]}") for k, norm in enumerate(norms)]
    for stage in range(4):
        ours, theirs = f"backbone.stages.layer{stage + 1}.*", f"{prefix}.encoder.stages.{stage}.layers.*"
        for k in range(3):
            rows.append(Pair(f"{ours}.conv{k + 1}", f"{theirs}.layer.{k}.{parts[0]}"))
            rows.append(Pair(f"{ours}.bn{k + 1}", f"{theirs}.layer.{k}.{parts[1]}"))
        shortcut = f"{theirs}.shortcut" + (".1" if stage else "")  # behind the pooling
        rows += [Pair(f"{ours}.downsample.{1 + i}", f"{shortcut}.{part}") for i, part in enumerate(parts)]
    return rows
