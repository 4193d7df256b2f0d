"""The names of what transformers' D-FINE holds, on disk and in memory."""

from __future__ import annotations

import re

from detrellis.interop.links import Pair
from detrellis.interop.names import QKV, feed_forward
from detrellis.interop.rtdetr import csp, hybrid_levels, normed
from detrellis.recipes.detector import DetectorConfig


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
