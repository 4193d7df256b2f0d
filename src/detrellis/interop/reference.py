"""The reference repositories' state dicts, and detrex's of DINO:
which network they hold. Its names stand in `reference_names.py`.

A state dict says its sizes by its shapes. What no shape tells (heads, dilation) comes from the
training arguments in the file, else from the papers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop.family import Loaded, Repository
from detrellis.interop.names import layer_count
from detrellis.interop.reference_names import FUSION, is_dino, shares_content, table
from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.conditional import conditional_detr_r50
from detrellis.recipes.config import Recipe
from detrellis.recipes.dab import (
    dab_deformable_detr_r50,
    dab_detr_r50,
    dn_deformable_detr_r50,
    dn_detr_r50,
)
from detrellis.recipes.deformable import (
    deformable_detr_r50,
    deformable_detr_r50_two_stage,
    deformable_detr_r50_two_stage_plus,
)
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.detr import detr_r50
from detrellis.recipes.dino import dino_r50
from detrellis.recipes.overrides import merged

Weights = Mapping[str, Tensor]
# Learned for each query, one of them in each family.
LEARNED = (
    "refpoint_embed.weight",
    "tgt_embed.weight",
    "transformer.tgt_embed.weight",
    "query_embed.weight",
)
# The decoder's second names of the heads.
REPEATED = re.compile(r"^transformer\.decoder\.(class|bbox)_embed\.")
SEGMENTATION = re.compile(r"^(detr\.|bbox_attention\.|mask_head\.)")


def recipe_of(weights: Weights, arguments: Mapping[str, Any]) -> Recipe:
    """The recipe of the network that the state dict holds, with the dict's sizes."""
    if any(SEGMENTATION.match(k) for k in weights):
        raise UserError(
            "a segmentation model: Detrellis has detectors only",
            "Give the weights of the detector.",
        )
    make = _family(weights)
    assert make is not None
    recipe = make()
    sizes = _sizes(weights, recipe.detector, arguments)
    detector = DetectorConfig.checked(merged(recipe.detector.model_dump(), sizes))
    name = recipe.name.replace("-r50", "")
    return recipe.model_copy(update={"name": name, "detector": detector})


_DEFORMABLE = "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight"
_CONDITIONAL = "transformer.decoder.layers.0.ca_qcontent_proj.weight"
_DETREX = "transformer.encoder.layers.0.attentions.0.sampling_offsets.weight"
# The first of these whose tensors are all there.
FAMILIES = {
    (_DETREX, "transformer.tgt_embed.weight"): dino_r50,
    (_DEFORMABLE, "transformer.tgt_embed.weight", "transformer.enc_output.weight"): dino_r50,
    (
        _DEFORMABLE,
        "refpoint_embed.weight",
        "tgt_embed.weight",
        "label_enc.weight",
    ): dn_deformable_detr_r50,
    (_DEFORMABLE, "refpoint_embed.weight", "tgt_embed.weight"): dab_deformable_detr_r50,
    (
        _DEFORMABLE,
        "transformer.pos_trans.weight",
        "query_embed.weight",
    ): deformable_detr_r50_two_stage_plus,
    (_DEFORMABLE, "transformer.pos_trans.weight"): deformable_detr_r50_two_stage,
    (_DEFORMABLE,): deformable_detr_r50,
    (_CONDITIONAL, "refpoint_embed.weight", "label_enc.weight"): dn_detr_r50,
    (_CONDITIONAL, "refpoint_embed.weight"): dab_detr_r50,
    (_CONDITIONAL,): conditional_detr_r50,
    ("transformer.decoder.layers.0.multihead_attn.in_proj_weight",): detr_r50,
}


def _family(weights: Weights) -> Callable[[], Recipe] | None:
    return next(
        (make for marker, make in FAMILIES.items() if all(part in weights for part in marker)), None
    )


def is_detrex(weights: Weights) -> bool:
    """Whether the names are detrex's."""
    return _DETREX in weights


def class_count(weights: Weights, detector: DetectorConfig) -> int:
    """Classes that the weights distinguish, without "no object"."""
    rows = weights[
        "class_embed.0.weight" if "class_embed.0.weight" in weights else "class_embed.weight"
    ].shape[0]
    return rows - 1 if detector.scores == "softmax" else rows


def _sizes(
    weights: Weights, detector: DetectorConfig, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The detector's fields that shapes and arguments decide."""
    detrex = is_detrex(weights)
    name = "ffns.0.layers.0.0.weight" if detrex else "linear1.weight"
    encoder, decoder = (
        weights[f"transformer.{part}.layers.0.{name}"] for part in ("encoder", "decoder")
    )
    heads = int(arguments.get("nheads", detector.decoder.heads))
    layers = {
        part: layer_count(weights, f"transformer.{part}.layers") for part in ("encoder", "decoder")
    }
    sizes: dict[str, Any] = {
        "width": encoder.shape[1],
        "encoder": {"heads": heads, "hidden": encoder.shape[0], "layers": layers["encoder"]},
        "decoder": {"heads": heads, "hidden": decoder.shape[0], "layers": layers["decoder"]},
        "queries": _query_sizes(weights, detector, arguments),
        "backbone": _backbone(weights, detector, arguments).model_dump(),
    }
    if detector.encoder.kind == "deformable":
        sizes = merged(sizes, _deformable_sizes(weights, detector, heads))
    if detrex:
        sizes |= {"position_temperature": 10000.0, "position_offset": -0.5}
    if detector.scores == "softmax":
        sizes["top_k"] = sizes["queries"]["count"]
    return sizes


def _query_sizes(
    weights: Weights, detector: DetectorConfig, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    if detector.queries.kind == "proposals":
        sizes["count"] = int(arguments.get("num_queries", detector.queries.count))
    else:
        rows = weights[next((k for k in LEARNED if k in weights), LEARNED[-1])].shape[0]
        rows = min(rows, int(arguments.get("num_queries_one2one", rows)))  # H-DETR
        sizes["count"] = rows // max(int(arguments.get("group_detr", 1)), 1)
    if "transformer.enc_output.weight" in weights:
        sizes["empty_compete"] = True
    anchors = detector.queries.kind == "anchors" and not detector.queries.indicator
    if anchors and "transformer.patterns.weight" in weights:
        sizes["patterns"] = weights["transformer.patterns.weight"].shape[0]
    return sizes


def _deformable_sizes(weights: Weights, detector: DetectorConfig, heads: int) -> dict[str, Any]:
    detrex = is_detrex(weights)
    levels = weights["transformer.level_embeds" if detrex else "transformer.level_embed"].shape[0]
    of_encoder, of_decoder = (
        ("attentions.0", "attentions.1") if detrex else ("self_attn", "cross_attn")
    )
    encoder, decoder = (
        weights[f"transformer.{part}.layers.0.{name}.attention_weights.weight"].shape[0]
        // (heads * levels)
        for part, name in (("encoder", of_encoder), ("decoder", of_decoder))
    )
    first, second = (weights.get(f"class_embed.{i}.weight") for i in (0, 1))
    shared = first is not None and second is not None and torch.equal(first, second)
    heads_of: dict[str, Any] = {}
    if is_dino(detector):
        heads_of["shared_heads"] = shared
    elif detector.queries.kind in ("learned", "proposals"):
        heads_of["refine"] = (
            "detached" if "transformer.decoder.bbox_embed.0.layers.0.weight" in weights else "none"
        )
    sizes: dict[str, Any] = {
        "encoder": {"levels": levels, "points": encoder},
        "cross_attention": {"points": decoder},
    }
    sizes["encoder"]["fusion"] = f"{FUSION}.0.weight" in weights
    return sizes | {"decoder": heads_of}


def _backbone(
    weights: Weights, detector: DetectorConfig, arguments: Mapping[str, Any]
) -> BackboneConfig:
    """Its ResNet by its number of blocks. DC5 has the same tensors: the arguments tell."""
    if is_detrex(weights):
        maps, prefix = layer_count(weights, "neck.convs"), "backbone.res{}"
        depths = tuple(layer_count(weights, prefix.format(stage)) for stage in (2, 3, 4, 5))
    else:
        levels = (
            weights["transformer.level_embed"].shape[0]
            if "transformer.level_embed" in weights
            else 1
        )
        extra = [
            k
            for k in weights
            if re.fullmatch(r"input_proj\.\d+\.0\.weight", k) and weights[k].shape[-1] == 3
        ]
        maps = levels - len(extra)
        depths = tuple(
            layer_count(weights, f"backbone.0.body.layer{stage}") for stage in (1, 2, 3, 4)
        )
    bottleneck = any(re.search(r"layer1\.0\.conv3|res2\.0\.conv3", k) for k in weights)
    known: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
    if bottleneck:
        known = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}
    name = known.get(depths)
    if name is None:
        raise UserError(f"the backbone has {depths} blocks a stage: only ResNets are supported")
    strides = {1: (32,), 3: (8, 16, 32), 4: (4, 8, 16, 32)}.get(maps)
    if strides is None:
        raise UserError(f"a detector on {maps} backbone maps is not supported")
    dilation = bool(arguments.get("dilation", detector.backbone.dilation))
    return BackboneConfig(
        name=name, pretrained=False, norm="frozen", dilation=dilation, strides=strides
    )


def unknown_label(weights: Weights, detector: DetectorConfig) -> dict[str, Tensor]:
    """DN-DETR's content of the main queries,
    the last row of its label embedding, under a name of its own.
    """
    if not shares_content(detector) or "label_enc.weight" not in weights:
        return {}
    return {"unknown_label": weights["label_enc.weight"][-1:]}


def own_queries(weights: Weights, detector: DetectorConfig) -> dict[str, Tensor]:
    """The first queries, where the tensor also holds those of training:
    H-DETR's second branch, Group DETR's groups.
    """
    present = {name: weights[name] for name in LEARNED if name in weights}
    return {
        k: v[: detector.queries.count]
        for k, v in present.items()
        if len(v) > detector.queries.count
    }


def loaded(weights: Weights, detector: DetectorConfig) -> Loaded:
    """The detector's tensors among those of training, and the family's names."""
    tensors = {**weights, **unknown_label(weights, detector), **own_queries(weights, detector)}
    return Loaded(tensors, table(detector, is_detrex(weights)))


REPOSITORY = Repository(
    "DETR, Conditional DETR, DAB-DETR, DN-DETR, Deformable DETR, DINO, and detrex's DINO",
    lambda weights: (
        _family(weights) is not None or any(SEGMENTATION.match(name) for name in weights)
    ),
    recipe_of,
    class_count,
    loaded,
)
