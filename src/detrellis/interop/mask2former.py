"""Mask2Former's names in transformers and in its own code, and the order of levels, which both have coarsest first."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from detrellis.interop.links import Pair
from detrellis.interop.names import sampling
from detrellis.recipes.detector import DetectorConfig

# 1x1 convolutions of theirs that are linear layers of ours.
_LINEAR = re.compile(r"(transformer_module\.input_projections|predictor\.input_proj)\.\d+\.weight$")


def as_linear(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights, those of 1x1 convolutions that are linear layers of ours as matrices."""
    return {name: w.flatten(1) if _LINEAR.search(name) else w for name, w in weights.items()}


def as_convolutions(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `as_linear`."""
    return {name: w[..., None, None] if _LINEAR.search(name) else w for name, w in weights.items()}


def turned(weights: Mapping[str, Tensor], detector: DetectorConfig) -> dict[str, Tensor]:
    """Weights under our names, with what is learned for each level in the opposite order."""
    encoder = detector.encoder
    split = (encoder.heads, encoder.levels, -1)
    sampled = re.compile(r"encoder\.layers\.\d+\.attention\.(sampling_offsets|attention_weights)\.")
    out = dict(weights)
    for name, value in weights.items():
        if sampled.match(name):
            out[name] = value.unflatten(0, split).flip(1).flatten(0, 2)
        elif name in ("neck.level_embed", "decoder.level_embed"):
            out[name] = value.flip(0)
    return out


def huggingface(detector: DetectorConfig) -> list[Pair]:
    """transformers' `Mask2FormerForUniversalSegmentation` without its backbone."""
    pixel, module = "model.pixel_level_module.decoder", "model.transformer_module"
    encoder, decoder = f"{pixel}.encoder.layers.*", f"{module}.decoder.layers.*"
    levels = detector.encoder.levels
    return [
        *(Pair(f"neck.projections.{i}.@", f"{pixel}.input_projections.{levels - 1 - i}.@") for i in range(levels)),
        *(Pair(f"decoder.projections.{i}", f"{module}.input_projections.{levels - 1 - i}") for i in range(levels)),
        Pair("neck.level_embed", f"{pixel}.level_embed"),
        *sampling("encoder.layers.*.attention", f"{encoder}.self_attn"),
        Pair("encoder.layers.*.norm", f"{encoder}.self_attn_layer_norm"),
        *_feed_forward("encoder.layers.*", encoder),
        Pair("masks.lateral.@", f"{pixel}.adapter_1.@"),
        Pair("masks.smooth.@", f"{pixel}.layer_1.@"),
        Pair("masks.project", f"{pixel}.mask_projection"),
        Pair("queries.content", f"{module}.queries_features.weight"),
        Pair("queries.position", f"{module}.queries_embedder.weight"),
        Pair("decoder.level_embed", f"{module}.level_embed.weight"),
        *_packed("decoder.layers.*.cross_attention", f"{decoder}.cross_attn"),
        Pair("decoder.layers.*.norm_cross", f"{decoder}.cross_attn_layer_norm"),
        Pair("decoder.layers.*.self_attention.projections", f"{decoder}.self_attn.{{q,k,v}}_proj"),
        Pair("decoder.layers.*.self_attention.output", f"{decoder}.self_attn.out_proj"),
        Pair("decoder.layers.*.norm_self", f"{decoder}.self_attn_layer_norm"),
        *_feed_forward("decoder.layers.*", decoder),
        Pair("decoder.final_norm", f"{module}.decoder.layernorm"),
        *(
            Pair(f"decoder.heads.embed.layers.{k}", f"{module}.decoder.mask_predictor.mask_embedder.{k}.0")
            for k in range(3)
        ),
        Pair("decoder.heads.classify", "class_predictor"),
    ]


def _packed(ours: str, theirs: str) -> list[Pair]:
    kinds = ("weight", "bias")
    joined = [Pair(f"{ours}.projections.{kind}", f"{theirs}.in_proj_{kind}") for kind in kinds]
    return [*joined, Pair(f"{ours}.output", f"{theirs}.out_proj")]


def _feed_forward(ours: str, theirs: str) -> list[Pair]:
    names = {"inner": "fc1", "outer": "fc2", "norm": "final_layer_norm"}
    return [Pair(f"{ours}.feed_forward.{own}", f"{theirs}.{other}") for own, other in names.items()]
