"""The names of what LW-DETR and RF-DETR hold:
transformers', and those of the authors' repositories.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from detrellis.interop.family import Weights
from detrellis.interop.links import Pair
from detrellis.interop.names import QKV, feed_forward, packed, sampling
from detrellis.recipes.backbones import WindowViTConfig
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.encoders import ProjectorEncoderConfig


def table(detector: DetectorConfig) -> list[Pair]:
    """Names of transformers' in memory."""
    backbone = detector.backbone
    assert isinstance(backbone, WindowViTConfig)
    vit, theirs = "model.backbone.backbone", _VIT[backbone.style]
    scales = "model.backbone.projector" + (".scale_layers.{}" if backbone.style == "cae" else "")
    layer = "model.decoder.layers.*"
    return [
        Pair("backbone.embedding.positions", f"{vit}.embeddings.position_embeddings"),
        *(Pair(f"backbone.{ours}", f"{vit}.{name}") for ours, name in theirs.items()),
        Pair("backbone.blocks.*.attn.qkv", f"{vit}.encoder.layer.*.attention.{QKV}"),
        Pair("backbone.blocks.*.attn.proj", f"{vit}.encoder.layer.*.attention.o_proj"),
        *_levels(detector, scales, f"{scales}.sampling_layers.{{}}.layers", _HUGGINGFACE_NAMES),
        Pair("queries.content", "model.query_feat.weight"),
        Pair("queries.deltas", "model.reference_point_embed.weight"),
        *_proposals("model"),
        Pair("decoder.position.mlp.@", "model.decoder.ref_point_head.@"),
        Pair("decoder.layers.*.self_attention.projections", f"{layer}.self_attn.{QKV}"),
        Pair("decoder.layers.*.self_attention.output", f"{layer}.self_attn.o_proj"),
        Pair("decoder.layers.*.norm_self", f"{layer}.self_attn_layer_norm"),
        *sampling("decoder.layers.*.cross_attention", f"{layer}.cross_attn"),
        Pair("decoder.layers.*.norm_cross", f"{layer}.cross_attn_layer_norm"),
        *feed_forward("decoder.layers.*", layer, "layer_norm", ("mlp.fc1", "mlp.fc2")),
        Pair("decoder.final_norm", "model.decoder.layernorm"),
        *_HEADS,
    ]


def authors_table(detector: DetectorConfig) -> list[Pair]:
    """Names in the authors' repositories, which transformers has on disk for RF-DETR."""
    backbone = detector.backbone
    assert isinstance(backbone, WindowViTConfig)
    layer, stages = "transformer.decoder.layers.*", "backbone.0.projector.stages"
    return [
        *(_AUTHORS_CAE if backbone.style == "cae" else _authors_dinov2()),
        *_levels(detector, f"{stages}.{{}}", f"{stages}_sampling.{{}}.{{}}", _AUTHORS_NAMES),
        Pair("queries.content", "query_feat.weight"),
        Pair("queries.deltas", "refpoint_embed.weight"),
        *_proposals("transformer"),
        Pair("decoder.position.mlp.@", "transformer.decoder.ref_point_head.@"),
        *packed("decoder.layers.*.self_attention", f"{layer}.self_attn"),
        Pair("decoder.layers.*.norm_self", f"{layer}.norm1"),
        *sampling("decoder.layers.*.cross_attention", f"{layer}.cross_attn"),
        Pair("decoder.layers.*.norm_cross", f"{layer}.norm2"),
        *feed_forward("decoder.layers.*", layer, "norm3"),
        Pair("decoder.final_norm", "transformer.decoder.norm"),
        *_HEADS,
    ]


_HEADS = [
    Pair("decoder.heads.classes.0", "class_embed"),
    Pair("decoder.heads.boxes.0.@", "bbox_embed.@"),
]
_BLOCK = "encoder.layer.*"
# Of transformers' ViTs in memory, by style: our names and theirs.
_VIT: dict[str, dict[str, str]] = {
    "cae": {
        "embedding.projection": "embeddings.projection",
        "blocks.*.norm1": f"{_BLOCK}.layernorm_before",
        "blocks.*.norm2": f"{_BLOCK}.layernorm_after",
        "blocks.*.mlp.fc1": f"{_BLOCK}.intermediate.fc1",
        "blocks.*.mlp.fc2": f"{_BLOCK}.intermediate.fc2",
        "blocks.*.ls1.gamma": f"{_BLOCK}.gamma_1",
        "blocks.*.ls2.gamma": f"{_BLOCK}.gamma_2",
    },
    "dinov2": {
        "embedding.projection": "embeddings.patch_embeddings.projection",
        "embedding.class_token": "embeddings.cls_token",
        "blocks.*.norm1": f"{_BLOCK}.norm1",
        "blocks.*.norm2": f"{_BLOCK}.norm2",
        "blocks.*.mlp.fc1": f"{_BLOCK}.mlp.fc1",
        "blocks.*.mlp.fc2": f"{_BLOCK}.mlp.fc2",
        "blocks.*.ls1.gamma": f"{_BLOCK}.layer_scale1.lambda1",
        "blocks.*.ls2.gamma": f"{_BLOCK}.layer_scale2.lambda1",
        "norm": "layernorm",
    },
}
_CAE = "backbone.0.encoder"
_AUTHORS_CAE = [
    Pair("backbone.embedding.positions", f"{_CAE}.pos_embed"),
    Pair("backbone.embedding.projection", f"{_CAE}.patch_embed.proj"),
    Pair("backbone.blocks.*.attn.qkv.weight", f"{_CAE}.blocks.*.attn.qkv.weight"),
    Pair("backbone.blocks.*.attn.qkv.bias", f"{_CAE}.blocks.*.attn.{{q,k,v}}_bias"),
    Pair("backbone.blocks.*.attn.proj", f"{_CAE}.blocks.*.attn.proj"),
    *(
        Pair(f"backbone.blocks.*.{n}", f"{_CAE}.blocks.*.{n}")
        for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
    ),
    *(Pair(f"backbone.blocks.*.ls{k}.gamma", f"{_CAE}.blocks.*.gamma_{k}") for k in (1, 2)),
]


def _authors_dinov2() -> list[Pair]:
    vit = "backbone.0.encoder.encoder"
    attention = f"{vit}.encoder.layer.*.attention"
    return [
        Pair("backbone.embedding.positions", f"{vit}.embeddings.position_embeddings"),
        *(Pair(f"backbone.{ours}", f"{vit}.{name}") for ours, name in _VIT["dinov2"].items()),
        Pair("backbone.blocks.*.attn.qkv", f"{attention}.attention.{{query,key,value}}"),
        Pair("backbone.blocks.*.attn.proj", f"{attention}.output.dense"),
    ]


def _proposals(prefix: str) -> list[Pair]:
    """The first group's head."""
    return [
        Pair("queries.head.projection", f"{prefix}.enc_output.0"),
        Pair("queries.head.norm", f"{prefix}.enc_output_norm.0"),
        Pair("queries.head.classify", f"{prefix}.enc_out_class_embed.0"),
        Pair("queries.head.move.@", f"{prefix}.enc_out_bbox_embed.0.@"),
    ]


# A row a query and group
QUERIES = re.compile(r"(^|\.)(query_feat|refpoint_embed|reference_point_embed)\.weight$")


class _Projector(NamedTuple):
    """What the parts of a level's projector are called."""

    first: str
    last: str
    bottleneck: str  # with the places of its index and of that of its convolution
    final: str
    norm: str  # of a convolution


_HUGGINGFACE_NAMES = _Projector(
    "projector_layer.conv1",
    "projector_layer.conv2",
    "projector_layer.bottlenecks.{}.conv{}",
    "layer_norm",
    "norm",
)
_AUTHORS_NAMES = _Projector("0.cv1", "0.cv2", "0.m.{}.cv{}", "1", "bn")


def _levels(detector: DetectorConfig, scale: str, resampler: str, names: _Projector) -> list[Pair]:
    """The projector; `scale` has the place of a level's index,
    `resampler` of a level's and a map's.
    """
    backbone, projector = detector.backbone, detector.encoder
    assert isinstance(backbone, WindowViTConfig)
    assert isinstance(projector, ProjectorEncoderConfig)
    rows = list[Pair]()

    def convolution(ours: str, theirs: str) -> None:
        rows.extend(
            (Pair(f"{ours}.0", f"{theirs}.conv"), Pair(f"{ours}.1", f"{theirs}.{names.norm}"))
        )

    for level, stride in enumerate(projector.strides):
        ours, theirs = f"neck.levels.{level}", scale.format(level)
        for tap in range(len(backbone.taps)):
            own, other = f"{ours}.resamplers.{tap}", resampler.format(level, tap)
            convolution(f"{own}.0", f"{other}.0")
            # A transposed convolution, behind one that narrows wide maps
            if stride < backbone.patch:
                rows += [Pair(f"{own}.{place}", f"{other}.{place}") for place in (0, 1)]
        convolution(f"{ours}.mix.first", f"{theirs}.{names.first}")
        convolution(f"{ours}.mix.last", f"{theirs}.{names.last}")
        for block in range(projector.blocks):
            for k in (0, 1):
                convolution(
                    f"{ours}.mix.bottlenecks.{block}.{k}",
                    f"{theirs}.{names.bottleneck.format(block, k + 1)}",
                )
        rows.append(Pair(f"{ours}.norm", f"{theirs}.{names.final}"))
    return rows


def is_authors(weights: Weights) -> bool:
    """Whether the names are those of the authors' repositories."""
    return "transformer.enc_output.0.weight" in weights  # a proposal head for each group


COUNTER = "num_batches_tracked"
KEY_BIAS = {"attention.q_proj.bias": "attention.k_proj.bias", "attn.q_bias": "attn.k_bias"}


def completed(weights: Weights, count: int) -> dict[str, Tensor]:
    """The weights of the first group, whose queries are `count`,
    with the biases that keys of CAE do without.
    """
    tensors = {
        name: value[:count] if QUERIES.search(name) else value for name, value in weights.items()
    }
    for name, value in weights.items():
        for query, key in KEY_BIAS.items():
            if name.endswith(query):
                tensors.setdefault(name.replace(query, key), torch.zeros_like(value))
    return tensors


def stored(weights: Weights) -> dict[str, Tensor]:
    """Without the biases of CAE's keys, which a softmax does not see,
    and with the counter of every BatchNorm.
    """
    mean = "running_mean"
    counters = {
        name.replace(mean, COUNTER): torch.tensor(0) for name in weights if name.endswith(mean)
    }
    return {
        name: value
        for name, value in weights.items()
        if not name.endswith(tuple(KEY_BIAS.values()))
    } | counters


def modern(name: str) -> str:
    """A name of LW-DETR's on disk as transformers calls it in memory."""
    for disk, memory in DISK.items():
        name = name.replace(disk, memory)
    return name


def on_disk(name: str) -> str:
    """The inverse of `modern`."""
    for disk, memory in DISK.items():
        name = name.replace(memory, disk)
    return name


DISK = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output": "attention.o_proj",
}
