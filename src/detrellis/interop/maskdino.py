"""Mask DINO's own checkpoints: which network a state dict holds, and its names.

What shapes do not tell is as in its published files: 8 heads, the double norm, and queries that
begin with the boxes around masks. Its levels run finest first in the encoder and coarsest first in
the decoder, or the other way round; the order of the projections tells.
"""

from __future__ import annotations

import re

from torch import Tensor

from detrellis.interop.family import Loaded, Repository, Weights
from detrellis.interop.links import Pair
from detrellis.interop.mask2former import backbone
from detrellis.interop.mask2former_config import backbone_of, pattern_count
from detrellis.interop.names import feed_forward, packed, sampling
from detrellis.recipes.config import Recipe
from detrellis.recipes.data import DataConfig
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.maskdino import mask_dino_r50, maskdino_detector
from detrellis.recipes.overrides import merged

HEAD = "sem_seg_head."
_SAMPLED = r"layers\.\d+\.{}\.(sampling_offsets|attention_weights)\."


def recipe_of(weights: Weights) -> Recipe:
    """Mask DINO's recipe with the sizes of a state dict."""
    ready = backbone_of(weights).replace(pretrained=False, norm="frozen_norm", strides=(8, 16, 32))
    detector = DetectorConfig.checked(
        merged(maskdino_detector(ready).model_dump(), sizes(weights, HEAD))
    )
    return mask_dino_r50().model_copy(
        update={"name": "mask-dino", "detector": detector, "data": DataConfig()}
    )


def sizes(weights: Weights, prefix: str) -> dict[str, object]:
    """The detector's fields that names and shapes decide,
    `prefix` being that of its names behind the backbone.
    """
    pixel, head = f"{prefix}pixel_decoder", f"{prefix}predictor"
    learned = weights.get(f"{head}.query_feat.weight")
    queries: dict[str, object] = {"empty_compete": True}
    if learned is not None:
        queries |= {"content_from": "learned", "count": len(learned)}
    if _finest_first(weights, prefix):
        queries["smallest_on"] = "coarsest"
    return {
        "width": weights[f"{head}.decoder_norm.weight"].shape[0],
        "encoder": {
            "hidden": weights[f"{pixel}.transformer.encoder.layers.0.linear1.weight"].shape[0],
            "layers": pattern_count(
                weights, rf"{re.escape(pixel)}\.transformer\.encoder\.layers\.(\d+)\."
            ),
            "levels": weights[f"{pixel}.transformer.level_embed"].shape[0],
        },
        "decoder": {
            "hidden": weights[f"{head}.decoder.layers.0.linear1.weight"].shape[0],
            "layers": pattern_count(weights, rf"{re.escape(head)}\.decoder\.layers\.(\d+)\."),
            "double_norm": True,
        },
        "queries": queries,
        "masks": {"width": weights[f"{pixel}.mask_features.weight"].shape[0]},
    }


def _finest_first(weights: Weights, prefix: str) -> bool:
    """Whether the encoder's levels are: channels of the backbone's maps grow with their strides."""
    first, second = (
        weights[f"{prefix}pixel_decoder.input_proj.{i}.0.weight"].shape[1] for i in (0, 1)
    )
    return first < second


def names(detector: DetectorConfig, prefix: str, *, finest_first: bool) -> list[Pair]:
    """Its names, `prefix` being that of those behind the backbone."""
    pixel, head = f"{prefix}pixel_decoder", f"{prefix}predictor"
    encoder, decoder = f"{pixel}.transformer.encoder.layers.*", f"{head}.decoder.layers.*"
    maps = len(detector.backbone.strides)
    of_boxes = f"{head}._bbox_embed.@|{head}.bbox_embed.*.@|{head}.decoder.bbox_embed.*.@"
    return [
        *(
            Pair(
                f"neck.projections.{i}.@",
                f"{pixel}.input_proj.{i if finest_first else maps - 1 - i}.@",
            )
            for i in range(maps)
        ),
        *(
            Pair(f"neck.extra.{i}.@", f"{pixel}.input_proj.{maps + i}.@")
            for i in range(detector.encoder.levels - maps)
        ),
        Pair("neck.level_embed", f"{pixel}.transformer.level_embed"),
        *sampling("encoder.layers.*.attention", f"{encoder}.self_attn"),
        Pair("encoder.layers.*.norm", f"{encoder}.norm1"),
        *feed_forward("encoder.layers.*", encoder, "norm2"),
        Pair("masks.lateral.0", f"{pixel}.adapter_1"),
        Pair("masks.lateral.1", f"{pixel}.adapter_1.norm"),
        Pair("masks.smooth.0", f"{pixel}.layer_1"),
        Pair("masks.smooth.1", f"{pixel}.layer_1.norm"),
        Pair("masks.project", f"{pixel}.mask_features"),
        Pair("queries.content", f"{head}.query_feat.weight"),
        Pair("queries.head.projection", f"{head}.enc_output"),
        Pair("queries.head.norm", f"{head}.enc_output_norm"),
        Pair("queries.head.output_norm", f"{head}.decoder_norm"),
        Pair("queries.head.classify", f"{head}.class_embed"),
        Pair("queries.head.move.@", of_boxes),
        Pair("queries.head.embed.@", f"{head}.mask_embed.@"),
        *sampling("decoder.layers.*.cross_attention", f"{decoder}.cross_attn"),
        Pair("decoder.layers.*.norm_cross", f"{decoder}.norm1"),
        *packed("decoder.layers.*.self_attention", f"{decoder}.self_attn"),
        Pair("decoder.layers.*.norm_self", f"{decoder}.norm2"),
        *feed_forward("decoder.layers.*", decoder, "norm3"),
        Pair("decoder.final_norm", f"{head}.decoder_norm|{head}.decoder.norm"),
        Pair("decoder.position.mlp.@", f"{head}.decoder.ref_point_head.@"),
        Pair("decoder.heads.classes.0", f"{head}.class_embed"),
        Pair("decoder.heads.boxes.0.@", of_boxes),
        Pair("decoder.heads.embed.@", f"{head}.mask_embed.@"),
    ]


def turned(weights: Weights, detector: DetectorConfig, *, finest_first: bool) -> dict[str, Tensor]:
    """The weights with what is learned for each level finest first,
    in encoder or decoder, whichever has it not.
    """
    part, attention = (
        ("predictor.decoder", "cross_attn")
        if finest_first
        else ("transformer.encoder", "self_attn")
    )
    sampled = re.compile(re.escape(part) + r"\." + _SAMPLED.format(attention))
    heads = detector.decoder.heads if finest_first else detector.encoder.heads
    out = dict(weights)
    for name, value in weights.items():
        if sampled.search(name):
            out[name] = (
                value.unflatten(0, (heads, detector.encoder.levels, -1)).flip(1).flatten(0, 2)
            )
        elif name.endswith("pixel_decoder.transformer.level_embed") and not finest_first:
            out[name] = value.flip(0)
    return out


def loaded(weights: Weights, detector: DetectorConfig) -> Loaded:
    """The tensors in the order of our levels, and their names."""
    first = _finest_first(weights, HEAD)
    table = [
        *names(detector, HEAD, finest_first=first),
        *backbone(detector, "backbone", of_transformers=False),
    ]
    return Loaded(turned(weights, detector, finest_first=first), table)


REPOSITORY = Repository(
    "Mask DINO",
    lambda weights: (
        f"{HEAD}predictor.enc_output.weight" in weights
        and f"{HEAD}pixel_decoder.adapter_1.weight" in weights
    ),
    lambda weights, arguments: recipe_of(weights),
    lambda weights, detector: weights[f"{HEAD}predictor.class_embed.weight"].shape[0],
    loaded,
)
