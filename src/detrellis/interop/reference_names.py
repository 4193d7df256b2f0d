"""The names of what the reference repositories' state dicts hold,
and detrex's of DINO, with what of a detector decides them.
"""

from __future__ import annotations

from detrellis.interop.links import Pair
from detrellis.interop.names import (
    deformable_neck,
    detectron2_resnet,
    mmcv_layers,
    packed,
    sampling,
    torchvision,
)
from detrellis.recipes.detector import DetectorConfig

FUSION = "transformer.encoder.fusion_layer"  # Stable-DINO's


def is_dino(detector: DetectorConfig) -> bool:
    """Whether its queries are DINO's: learned content at the places of proposals."""
    return detector.queries.kind == "mixed" and detector.queries.position == "boxes"


def shares_content(detector: DetectorConfig) -> bool:
    """Whether all queries have one content, as in DN-DETR."""
    return detector.queries.kind == "anchors" and detector.queries.content == "shared"


def table(detector: DetectorConfig, detrex: bool) -> list[Pair]:
    """The names of the family that `recipe_of` found."""
    if detrex:
        return _detrex(detector)
    shared = [
        *torchvision("backbone.0.body"),
        *packed("decoder.layers.*.self_attention", "transformer.decoder.layers.*.self_attn"),
        Pair("encoder.layers.*.norm", "transformer.encoder.layers.*.norm1"),
        Pair("encoder.layers.*.feed_forward.norm", "transformer.encoder.layers.*.norm2"),
        Pair("decoder.layers.*.feed_forward.norm", "transformer.decoder.layers.*.norm3"),
        *(
            Pair(f"{part}.layers.*.feed_forward.{ours}", f"transformer.{part}.layers.*.{theirs}")
            for part in ("encoder", "decoder")
            for ours, theirs in (
                ("inner", "linear1"),
                ("outer", "linear2"),
                ("activation", "activation"),
            )
        ),
        Pair("decoder.final_norm", "transformer.decoder.norm"),
        Pair("decoder.position.scale.@", "transformer.decoder.query_scale.@"),
        Pair("decoder.position.mlp.@", "transformer.decoder.ref_point_head.@"),
        Pair("queries.{centres,sizes}", "refpoint_embed.weight", 1),
    ]
    return [
        *(_deformable(detector) if detector.encoder.kind == "deformable" else _dense(detector)),
        *shared,
    ]


def _dense(detector: DetectorConfig) -> list[Pair]:
    decoder = "transformer.decoder.layers.*"
    anchors = detector.queries.kind == "anchors"
    content = "unknown_label" if shares_content(detector) else "transformer.patterns.weight"
    return [
        Pair("neck.projection", "input_proj"),
        Pair("queries.position", "query_embed.weight"),
        Pair("queries.content", content),
        Pair("queries.reference.@", "transformer.decoder.ref_point_head.@"),
        *packed("encoder.layers.*.attention", "transformer.encoder.layers.*.self_attn"),
        Pair("encoder.position_scale.@", "transformer.encoder.query_scale.@"),
        Pair("decoder.position.size.@", "transformer.decoder.ref_anchor_head.@"),
        Pair("decoder.layers.*.norm_self", f"{decoder}.norm1"),
        Pair("decoder.layers.*.norm_cross", f"{decoder}.norm2"),
        *packed("decoder.layers.*.cross_attention", f"{decoder}.multihead_attn")[:2],
        Pair(
            "decoder.layers.*.self_attention.content", f"{decoder}.sa_{{qcontent,kcontent,v}}_proj"
        ),
        Pair("decoder.layers.*.self_attention.position", f"{decoder}.sa_{{qpos,kpos}}_proj"),
        Pair("decoder.layers.*.cross_attention.query", f"{decoder}.ca_qcontent_proj"),
        Pair("decoder.layers.*.cross_attention.query_sine", f"{decoder}.ca_qpos_sine_proj"),
        Pair("decoder.layers.*.cross_attention.query_position", f"{decoder}.ca_qpos_proj"),
        Pair("decoder.layers.*.cross_attention.memory", f"{decoder}.ca_{{kcontent,v}}_proj"),
        Pair("decoder.layers.*.cross_attention.key_position", f"{decoder}.ca_kpos_proj"),
        Pair(
            "decoder.layers.*.cross_attention.output",
            f"{decoder}.{'multihead_attn' if detector.cross_attention.kind == 'dense' else 'cross_attn'}.out_proj",
        ),
        Pair("decoder.heads.classes.0", "class_embed"),
        Pair(
            "decoder.heads.boxes.0.@",
            "bbox_embed.@" + ("|transformer.decoder.bbox_embed.@" if anchors else ""),
        ),
    ]


def _deformable(detector: DetectorConfig) -> list[Pair]:
    last = detector.decoder.layers
    dino = is_dino(detector)
    classify, move = (
        ("transformer.enc_out_class_embed", "transformer.enc_out_bbox_embed.@")
        if dino
        else (f"class_embed.{last}", f"bbox_embed.{last}.@")
    )
    content = {
        "anchors": "tgt_embed.weight",
        "mixed": "transformer.tgt_embed.weight" if dino else "query_embed.weight",
    }
    return [
        *deformable_neck(len(detector.backbone.strides), "input_proj"),
        Pair("neck.level_embed", "transformer.level_embed"),
        *sampling("encoder.layers.*.attention", "transformer.encoder.layers.*.self_attn"),
        *sampling("decoder.layers.*.cross_attention", "transformer.decoder.layers.*.cross_attn"),
        Pair("decoder.layers.*.norm_cross", "transformer.decoder.layers.*.norm1"),
        Pair("decoder.layers.*.norm_self", "transformer.decoder.layers.*.norm2"),
        *(
            [Pair("queries.content", content[detector.queries.kind])]
            if detector.queries.kind in content
            else [Pair("queries.{position,content}", "query_embed.weight", 1)]
        ),
        Pair("queries.reference", "transformer.reference_points"),
        Pair("queries.head.projection", "transformer.enc_output"),
        Pair("queries.head.norm", "transformer.enc_output_norm"),
        Pair("queries.head.classify", classify),
        Pair("queries.head.move.@", move),
        Pair("queries.derive.0", "transformer.pos_trans"),
        Pair("queries.derive.1", "transformer.pos_trans_norm"),
        *heads(detector),
    ]


def heads(detector: DetectorConfig) -> list[Pair]:
    """Class and box heads: one a layer in theirs, which share a tensor where ours is one."""
    layer = "0" if detector.decoder.shared_heads or detector.decoder.refine == "none" else "*"
    return [
        Pair(f"decoder.heads.classes.{layer}", "class_embed.*"),
        *(
            Pair(f"decoder.heads.boxes.{layer}.layers.{k}", f"bbox_embed.*.layers.{k}")
            for k in range(3)
        ),
    ]


def _detrex(detector: DetectorConfig) -> list[Pair]:
    last = detector.decoder.layers
    neck = [
        Pair(f"neck.{ours}.*.{i}", f"neck.{theirs}.*.{part}")
        for ours, theirs in (("projections", "convs"), ("extra", "extra_convs"))
        for i, part in enumerate(("conv", "norm"))
    ]
    return [
        *detectron2_resnet("backbone"),
        *neck,
        Pair("neck.level_embed", "transformer.level_embeds"),
        Pair("encoder.fusion.projection", f"{FUSION}.0"),
        Pair("encoder.fusion.norm", f"{FUSION}.1"),
        *mmcv_layers("transformer"),
        Pair("decoder.position.mlp.@", "transformer.decoder.ref_point_head.@"),
        Pair("queries.content", "transformer.tgt_embed.weight"),
        Pair("queries.head.classify", f"class_embed.{last}"),
        Pair("queries.head.move.@", f"bbox_embed.{last}.@"),
        *heads(detector),
    ]
