"""Mask2Former's names in transformers and in its own code,
and the order of levels, which both have coarsest first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from detrellis.interop import swin
from detrellis.interop.links import Pair
from detrellis.interop.names import (
    detectron2_resnet,
    feed_forward,
    huggingface_resnet,
    packed,
    sampling,
)
from detrellis.recipes.backbones import RESNETS, BackboneConfig
from detrellis.recipes.config import Recipe
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


def constants(recipe: Recipe, classes: int) -> dict[str, Tensor]:
    """What transformers' Mask2Former holds besides:
    weights of its loss, and a norm of its Swin that nobody reads.
    """
    backbone = recipe.detector.backbone
    assert isinstance(backbone, BackboneConfig)
    tensors = {
        "criterion.empty_weight": torch.cat(
            [torch.ones(classes), torch.tensor([recipe.loss.no_object])]
        )
    }
    if backbone.name not in RESNETS:
        channels = 8 * swin.config_of(backbone.name)["embed_dim"]
        norm = "model.pixel_level_module.encoder.swin.layernorm"
        tensors |= {f"{norm}.weight": torch.ones(channels), f"{norm}.bias": torch.zeros(channels)}
    return tensors


def backbone(detector: DetectorConfig, prefix: str, *, of_transformers: bool) -> list[Pair]:
    """The backbone's names, of transformers or of detectron2."""
    assert isinstance(detector.backbone, BackboneConfig)
    if detector.backbone.name in RESNETS:
        return (huggingface_resnet if of_transformers else detectron2_resnet)(prefix)
    return (swin.huggingface if of_transformers else swin.detectron2)(prefix)


def huggingface(detector: DetectorConfig) -> list[Pair]:
    """transformers' `Mask2FormerForUniversalSegmentation`."""
    pixel, module = "model.pixel_level_module.decoder", "model.transformer_module"
    encoder, decoder = f"{pixel}.encoder.layers.*", f"{module}.decoder.layers.*"
    levels = detector.encoder.levels
    return [
        *(
            Pair(f"neck.projections.{i}.@", f"{pixel}.input_projections.{levels - 1 - i}.@")
            for i in range(levels)
        ),
        *(
            Pair(f"decoder.projections.{i}", f"{module}.input_projections.{levels - 1 - i}")
            for i in range(levels)
        ),
        Pair("neck.level_embed", f"{pixel}.level_embed"),
        *sampling("encoder.layers.*.attention", f"{encoder}.self_attn"),
        Pair("encoder.layers.*.norm", f"{encoder}.self_attn_layer_norm"),
        *feed_forward("encoder.layers.*", encoder, "final_layer_norm", ("fc1", "fc2")),
        Pair("masks.lateral.@", f"{pixel}.adapter_1.@"),
        Pair("masks.smooth.@", f"{pixel}.layer_1.@"),
        Pair("masks.project", f"{pixel}.mask_projection"),
        Pair("queries.content", f"{module}.queries_features.weight"),
        Pair("queries.position", f"{module}.queries_embedder.weight"),
        Pair("decoder.level_embed", f"{module}.level_embed.weight"),
        *packed("decoder.layers.*.cross_attention", f"{decoder}.cross_attn"),
        Pair("decoder.layers.*.norm_cross", f"{decoder}.cross_attn_layer_norm"),
        Pair("decoder.layers.*.self_attention.projections", f"{decoder}.self_attn.{{q,k,v}}_proj"),
        Pair("decoder.layers.*.self_attention.output", f"{decoder}.self_attn.out_proj"),
        Pair("decoder.layers.*.norm_self", f"{decoder}.self_attn_layer_norm"),
        *feed_forward("decoder.layers.*", decoder, "final_layer_norm", ("fc1", "fc2")),
        Pair("decoder.final_norm", f"{module}.decoder.layernorm"),
        *(
            Pair(
                f"decoder.heads.embed.layers.{k}",
                f"{module}.decoder.mask_predictor.mask_embedder.{k}.0",
            )
            for k in range(3)
        ),
        Pair("decoder.heads.classify", "class_predictor"),
        *backbone(detector, "model.pixel_level_module.encoder", of_transformers=True),
    ]


def detectron2(detector: DetectorConfig) -> list[Pair]:
    """The names of Mask2Former's own code."""
    pixel, head = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    encoder = f"{pixel}.transformer.encoder.layers.*"
    levels = detector.encoder.levels
    layers = {
        part: f"{head}.transformer_{part}_layers.*"
        for part in ("cross_attention", "self_attention", "ffn")
    }
    return [
        *(
            Pair(f"neck.projections.{i}.@", f"{pixel}.input_proj.{levels - 1 - i}.@")
            for i in range(levels)
        ),
        *(
            Pair(f"decoder.projections.{i}", f"{head}.input_proj.{levels - 1 - i}")
            for i in range(levels)
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
        Pair("queries.content", f"{head}.query_feat.weight|{head}.static_query.weight"),
        Pair("queries.position", f"{head}.query_embed.weight"),
        Pair("decoder.level_embed", f"{head}.level_embed.weight"),
        *packed("decoder.layers.*.cross_attention", f"{layers['cross_attention']}.multihead_attn"),
        Pair("decoder.layers.*.norm_cross", f"{layers['cross_attention']}.norm"),
        *packed("decoder.layers.*.self_attention", f"{layers['self_attention']}.self_attn"),
        Pair("decoder.layers.*.norm_self", f"{layers['self_attention']}.norm"),
        *feed_forward("decoder.layers.*", layers["ffn"], "norm"),
        Pair("decoder.final_norm", f"{head}.decoder_norm"),
        *(
            Pair(f"decoder.heads.embed.layers.{k}", f"{head}.mask_embed.layers.{k}")
            for k in range(3)
        ),
        Pair("decoder.heads.classify", f"{head}.class_embed"),
        *backbone(detector, "backbone", of_transformers=False),
    ]
