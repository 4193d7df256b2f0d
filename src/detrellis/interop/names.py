"""The tables: how Hugging Face and the reference repositories call what a detector holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from detrellis.interop.links import Pair
from detrellis.recipes.detector import DetectorConfig

# Ours is one matrix.
QKV = "{q,k,v}_proj"


def huggingface(config: DetectorConfig, native: bool = False) -> list[Pair]:
    """Names in memory, which `modern` makes of those on disk;
    `native`: the backbone is their own ResNet.
    """
    if config.cross_attention.kind == "deformable":
        pairs = _hf_deformable(config)
        backbone = "model.backbone.model"
    elif config.queries.kind == "anchors":
        pairs = HF_DAB
        backbone = "model.backbone.conv_encoder.model" + ("" if native else "._backbone")
    else:
        pairs = HF_DETR + (
            HF_CONDITIONAL if config.cross_attention.kind == "conditional" else HF_DENSE_DECODER
        )
        backbone = "model.backbone.model"
    return [
        *pairs,
        *HF_SHARED,
        *(huggingface_resnet(backbone) if native else torchvision(backbone)),
    ]


def torchvision(prefix: str) -> list[Pair]:
    """The backbone under torchvision's and timm's names."""
    return [
        Pair("backbone.stem.0", f"{prefix}.conv1"),
        Pair("backbone.stem.1", f"{prefix}.bn1"),
        Pair("backbone.stages.@", f"{prefix}.@"),
    ]


def huggingface_resnet(prefix: str) -> list[Pair]:
    """transformers' own ResNet."""
    rows = [
        Pair("backbone.stem.0", f"{prefix}.embedder.embedder.convolution"),
        Pair("backbone.stem.1", f"{prefix}.embedder.embedder.normalization"),
    ]
    for stage in range(4):
        ours = f"backbone.stages.layer{stage + 1}.*"
        theirs = f"{prefix}.encoder.stages.{stage}.layers.*"
        for k in range(3):
            rows += [
                Pair(f"{ours}.conv{k + 1}", f"{theirs}.layer.{k}.convolution"),
                Pair(f"{ours}.bn{k + 1}", f"{theirs}.layer.{k}.normalization"),
            ]
        rows += [
            Pair(f"{ours}.downsample.0", f"{theirs}.shortcut.convolution"),
            Pair(f"{ours}.downsample.1", f"{theirs}.shortcut.normalization"),
        ]
    return rows


def detectron2_resnet(prefix: str) -> list[Pair]:
    """detectron2's ResNet."""
    rows = [
        Pair("backbone.stem.0", f"{prefix}.stem.conv1"),
        Pair("backbone.stem.1", f"{prefix}.stem.conv1.norm"),
    ]
    for stage in range(1, 5):
        ours, theirs = f"backbone.stages.layer{stage}.*", f"{prefix}.res{stage + 1}.*"
        for k in (1, 2, 3):
            rows += [
                Pair(f"{ours}.conv{k}", f"{theirs}.conv{k}"),
                Pair(f"{ours}.bn{k}", f"{theirs}.conv{k}.norm"),
            ]
        rows += [
            Pair(f"{ours}.downsample.0", f"{theirs}.shortcut"),
            Pair(f"{ours}.downsample.1", f"{theirs}.shortcut.norm"),
        ]
    return rows


HF_SHARED = [
    Pair("neck.projection", "model.input_projection"),
    Pair("encoder.layers.*.norm", "model.encoder.layers.*.self_attn_layer_norm"),
    Pair("encoder.layers.*.feed_forward.norm", "model.encoder.layers.*.final_layer_norm"),
    Pair("encoder.layers.*.feed_forward.inner", "model.encoder.layers.*.mlp.fc1"),
    Pair("encoder.layers.*.feed_forward.outer", "model.encoder.layers.*.mlp.fc2"),
    Pair("decoder.layers.*.norm_self", "model.decoder.layers.*.self_attn_layer_norm"),
    Pair("decoder.layers.*.norm_cross", "model.decoder.layers.*.encoder_attn_layer_norm"),
    Pair("decoder.layers.*.feed_forward.norm", "model.decoder.layers.*.final_layer_norm"),
    Pair("decoder.layers.*.feed_forward.inner", "model.decoder.layers.*.mlp.fc1"),
    Pair("decoder.layers.*.feed_forward.outer", "model.decoder.layers.*.mlp.fc2"),
    Pair("decoder.final_norm", "model.decoder.layernorm"),
]
HF_SLOPES = [  # of a PReLU
    Pair(f"{part}.layers.*.feed_forward.activation", f"model.{part}.layers.*.mlp.activation_fn")
    for part in ("encoder", "decoder")
]
HF_DETR = [
    *HF_SLOPES,
    Pair("queries.position", "model.query_position_embeddings.weight"),
    Pair("encoder.layers.*.attention.projections", f"model.encoder.layers.*.self_attn.{QKV}"),
    Pair("encoder.layers.*.attention.output", "model.encoder.layers.*.self_attn.o_proj"),
    Pair("decoder.heads.classes.0", "class_labels_classifier"),
    Pair("decoder.heads.boxes.0.@", "bbox_predictor.@"),
]
HF_DENSE_DECODER = [
    Pair("decoder.layers.*.self_attention.projections", f"model.decoder.layers.*.self_attn.{QKV}"),
    Pair("decoder.layers.*.self_attention.output", "model.decoder.layers.*.self_attn.o_proj"),
    Pair(
        "decoder.layers.*.cross_attention.projections", f"model.decoder.layers.*.encoder_attn.{QKV}"
    ),
    Pair("decoder.layers.*.cross_attention.output", "model.decoder.layers.*.encoder_attn.o_proj"),
]
HF_CONDITIONAL = [
    Pair("queries.reference.@", "model.decoder.ref_point_head.@"),
    Pair("decoder.position.scale.@", "model.decoder.query_scale.@"),
    Pair(
        "decoder.layers.*.self_attention.content",
        "model.decoder.layers.*.self_attn.{q_content,k_content,v}_proj",
    ),
    Pair(
        "decoder.layers.*.self_attention.position",
        "model.decoder.layers.*.self_attn.{q_pos,k_pos}_proj",
    ),
    Pair("decoder.layers.*.self_attention.output", "model.decoder.layers.*.self_attn.o_proj"),
    Pair(
        "decoder.layers.*.cross_attention.query",
        "model.decoder.layers.*.encoder_attn.q_content_proj",
    ),
    Pair(
        "decoder.layers.*.cross_attention.query_sine",
        "model.decoder.layers.*.encoder_attn.q_pos_sine_proj",
    ),
    Pair(
        "decoder.layers.*.cross_attention.query_position",
        "model.decoder.layers.*.encoder_attn.q_pos_proj",
    ),
    Pair(
        "decoder.layers.*.cross_attention.memory",
        "model.decoder.layers.*.encoder_attn.{k_content,v}_proj",
    ),
    Pair(
        "decoder.layers.*.cross_attention.key_position",
        "model.decoder.layers.*.encoder_attn.k_pos_proj",
    ),
    Pair("decoder.layers.*.cross_attention.output", "model.decoder.layers.*.encoder_attn.o_proj"),
]
_SELF = "model.decoder.layers.*.self_attn.self_attn"
_CROSS = "model.decoder.layers.*.cross_attn.cross_attn"
HF_DAB = [
    Pair("queries.{centres,sizes}", "model.query_refpoint_embeddings.weight", 1),
    Pair("queries.content", "model.patterns.weight"),
    Pair("encoder.position_scale.@", "model.encoder.query_scale.@"),
    Pair("encoder.layers.*.attention.projections", f"model.encoder.layers.*.self_attn.{QKV}"),
    Pair("encoder.layers.*.attention.output", "model.encoder.layers.*.self_attn.out_proj"),
    Pair("encoder.layers.*.feed_forward.inner", "model.encoder.layers.*.fc1"),
    Pair("encoder.layers.*.feed_forward.outer", "model.encoder.layers.*.fc2"),
    Pair("encoder.layers.*.feed_forward.activation", "model.encoder.layers.*.activation_fn"),
    Pair("decoder.position.mlp.@", "model.decoder.ref_point_head.@"),
    Pair("decoder.position.scale.@", "model.decoder.query_scale.@"),
    Pair("decoder.position.size.@", "model.decoder.ref_anchor_head.@"),
    Pair(
        "decoder.layers.*.self_attention.content", _SELF + "_{query_content,key_content,value}_proj"
    ),
    Pair("decoder.layers.*.self_attention.position", _SELF + "_{query_pos,key_pos}_proj"),
    Pair("decoder.layers.*.self_attention.output", _SELF + ".output_proj"),
    Pair("decoder.layers.*.norm_self", _SELF + "_layer_norm"),
    Pair("decoder.layers.*.cross_attention.query", _CROSS + "_query_content_proj"),
    Pair("decoder.layers.*.cross_attention.query_sine", _CROSS + "_query_pos_sine_proj"),
    Pair("decoder.layers.*.cross_attention.query_position", _CROSS + "_query_pos_proj"),
    Pair("decoder.layers.*.cross_attention.memory", _CROSS + "_{key_content,value}_proj"),
    Pair("decoder.layers.*.cross_attention.key_position", _CROSS + "_key_pos_proj"),
    Pair("decoder.layers.*.cross_attention.output", _CROSS + ".output_proj"),
    Pair("decoder.layers.*.norm_cross", _CROSS + "_layer_norm"),
    Pair("decoder.layers.*.feed_forward.activation", "model.decoder.layers.*.mlp.activation_fn"),
    Pair("decoder.layers.*.feed_forward.norm", "model.decoder.layers.*.mlp.final_layer_norm"),
    Pair("decoder.heads.classes.0", "class_embed"),
    Pair("decoder.heads.boxes.0.@", "bbox_predictor.@|model.decoder.bbox_embed.@"),
]


def _hf_deformable(config: DetectorConfig) -> list[Pair]:
    layers, maps = config.decoder.layers, len(config.backbone.strides)
    refine, two_stage = config.decoder.refine != "none", config.two_stage
    # With refinement the decoder holds the box heads too, in two stages also the class heads;
    # without it ours is one.
    classes = "class_embed.*" + ("|model.decoder.class_embed.*" if two_stage else "")
    boxes = "bbox_embed.*" + ("|model.decoder.bbox_embed.*" if refine else "")
    head = "*" if refine else "0"
    proposals = f"class_embed.{layers}|model.decoder.class_embed.{layers}"
    return [
        *HF_SLOPES,
        Pair("queries.{position,content}", "model.query_position_embeddings.weight", 1),
        Pair("queries.reference", "model.reference_points"),
        *deformable_neck(maps, "model.input_proj"),
        Pair("neck.level_embed", "model.level_embed"),
        *sampling("encoder.layers.*.attention", "model.encoder.layers.*.self_attn"),
        *sampling("decoder.layers.*.cross_attention", "model.decoder.layers.*.encoder_attn"),
        Pair(
            "decoder.layers.*.self_attention.projections", f"model.decoder.layers.*.self_attn.{QKV}"
        ),
        Pair("decoder.layers.*.self_attention.output", "model.decoder.layers.*.self_attn.o_proj"),
        Pair("queries.head.projection", "model.enc_output"),
        Pair("queries.head.norm", "model.enc_output_norm"),
        Pair("queries.head.classify", proposals),
        Pair(
            "queries.head.move.@",
            "|".join(f"{p}bbox_embed.{layers}.@" for p in ("", "model.decoder.")),
        ),
        Pair("queries.derive.0", "model.pos_trans"),
        Pair("queries.derive.1", "model.pos_trans_norm"),
        Pair(f"decoder.heads.classes.{head}", classes),
        *(
            Pair(f"decoder.heads.boxes.{head}.layers.{k}", boxes.replace("*", f"*.layers.{k}"))
            for k in range(3)
        ),
    ]


def sampling(ours: str, theirs: str) -> list[Pair]:
    """Deformable attention, which everybody but us abbreviates alike."""
    return [
        Pair(f"{ours}.sampling_offsets", f"{theirs}.sampling_offsets"),
        Pair(f"{ours}.attention_weights", f"{theirs}.attention_weights"),
        Pair(f"{ours}.value_projection", f"{theirs}.value_proj"),
        Pair(f"{ours}.output_projection", f"{theirs}.output_proj"),
    ]


def packed(ours: str, theirs: str) -> list[Pair]:
    """Attention as torch's own module keeps it: queries, keys and values in one matrix."""
    joined = [
        Pair(f"{ours}.projections.{kind}", f"{theirs}.in_proj_{kind}")
        for kind in ("weight", "bias")
    ]
    return [*joined, Pair(f"{ours}.output", f"{theirs}.out_proj")]


def feed_forward(
    ours: str, theirs: str, norm: str, layers: tuple[str, str] = ("linear1", "linear2")
) -> list[Pair]:
    """The feed-forward part of a layer:
    its two linear `layers`, which the reference codes call alike, and its norm.
    """
    names = {"inner": layers[0], "outer": layers[1], "norm": norm}
    return [Pair(f"{ours}.feed_forward.{part}", f"{theirs}.{name}") for part, name in names.items()]


def layer_count(weights: Iterable[str], prefix: str) -> int:
    """How many layers the names below the prefix have numbers of."""
    return len(
        {int(m[1]) for name in weights if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", name))}
    )


def mmcv_layers(theirs: str) -> list[Pair]:
    """Encoder and decoder as mmcv builds them,
    below the module that detrex and mmdetection call the transformer.
    """
    encoder, decoder = f"{theirs}.encoder.layers.*", f"{theirs}.decoder.layers.*"
    return [
        *sampling("encoder.layers.*.attention", f"{encoder}.attentions.0"),
        Pair("encoder.layers.*.norm", f"{encoder}.norms.0"),
        Pair("encoder.layers.*.feed_forward.norm", f"{encoder}.norms.1"),
        *packed("decoder.layers.*.self_attention", f"{decoder}.attentions.0.attn"),
        *sampling("decoder.layers.*.cross_attention", f"{decoder}.attentions.1"),
        Pair("decoder.layers.*.norm_self", f"{decoder}.norms.0"),
        Pair("decoder.layers.*.norm_cross", f"{decoder}.norms.1"),
        Pair("decoder.layers.*.feed_forward.norm", f"{decoder}.norms.2"),
        *(
            Pair(
                f"{ours}.layers.*.feed_forward.{part}",
                f"{theirs}.{ours}.layers.*.ffns.0.layers.{name}",
            )
            for ours in ("encoder", "decoder")
            for part, name in (("inner", "0.0"), ("outer", "1"))
        ),
        Pair("decoder.final_norm", f"{theirs}.decoder.norm"),
        Pair("queries.head.projection", f"{theirs}.enc_output"),
        Pair("queries.head.norm", f"{theirs}.enc_output_norm"),
    ]


def deformable_neck(maps: int, theirs: str) -> list[Pair]:
    """Our extra levels count on from the backbone's maps in theirs."""
    extra = [Pair(f"neck.extra.{i}.@", f"{theirs}.{maps + i}.@") for i in range(4)]
    return [Pair("neck.projections.@", f"{theirs}.@"), *extra]


def tied_heads(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The class heads that a file leaves out because they are tied to the first one;
    ours are one a layer.
    """
    first = {kind: weights.get(f"class_embed.0.{kind}") for kind in ("weight", "bias")}
    names = [
        (f"class_embed.{layer}.{kind}", value)
        for layer in range(layers)
        for kind, value in first.items()
    ]
    return {
        n: v
        for n, v in names
        if v is not None and n not in weights and f"model.decoder.{n}" not in weights
    }


def modern(name: str, kind: str) -> str:
    """A name on disk as transformers calls it in memory; one in memory stays as it is."""
    if kind == "dab-detr":
        return name
    name = name.replace("backbone.conv_encoder.", "backbone.")
    name = re.sub(r"layers\.(\d+)\.(fc[12]|activation_fn)\.", r"layers.\1.mlp.\2.", name)
    name = re.sub(r"(self_attn|encoder_attn)\.out_proj\.", r"\1.o_proj.", name)
    for short, module in (("sa", "self_attn"), ("ca", "encoder_attn")):
        name = re.sub(
            rf"\.{short}_([qkv])(content|pos_sine|pos)?_proj\.", _projection(module), name
        )
    return name


def _projection(module: str) -> Callable[[re.Match[str]], str]:
    return lambda m: f".{module}.{m[1]}{'_' + m[2] if m[2] else ''}_proj."


def on_disk(name: str, kind: str) -> str:
    """The inverse of `modern`: what every version of transformers reads."""
    if kind == "dab-detr":
        return name
    name = name.replace("model.backbone.model.", "model.backbone.conv_encoder.model.")
    name = re.sub(r"layers\.(\d+)\.mlp\.(fc[12])\.", r"layers.\1.\2.", name)
    name = re.sub(r"(self_attn|encoder_attn)\.o_proj\.", r"\1.out_proj.", name)
    if kind == "conditional_detr":
        for short, module in (("sa", "self_attn"), ("ca", "encoder_attn")):
            pattern = rf"(decoder\.layers\.\d+)\.{module}\.([qkv])_?(content|pos_sine|pos)?_proj\."
            name = re.sub(pattern, rf"\1.{short}_\2\3_proj.", name)
    return name
