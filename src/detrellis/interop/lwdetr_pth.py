"""The authors' checkpoints of LW-DETR and RF-DETR: which network a state dict holds."""

from __future__ import annotations

from typing import Any

from detrellis.interop import lwdetr, lwdetr_names
from detrellis.interop.family import Config, Loaded, Repository, Weights
from detrellis.interop.lwdetr import LW, RF
from detrellis.interop.rtdetr_pth import count
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig

LAYERS, HEAD = "transformer.decoder.layers", "transformer.enc_output"
# What no shape tells where a file has no arguments: as published, of LW-DETR's ViTs by their number
# of blocks, and of RF-DETR's by the side of a patch.
TAPS = {6: (1, 3, 5), 10: (2, 4, 5, 9)}  # blocks, counted from 0
WINDOWED = {6: (0, 2, 4), 10: (0, 1, 3, 6, 7, 9)}
STAGES = {14: (2, 5, 8, 11), 16: (3, 6, 9, 12)}  # after how many blocks
WINDOWS = {14: 4, 16: 2}
PIXELS = {14: 560}  # sides of images, where they are not those of the table of positions


def recipe_of(weights: Weights, arguments: Config) -> Recipe:
    """The recipe of a state dict: that of a `config.json` with its sizes.
    RF-DETR's projector has the norms that its authors train with."""
    width = weights["transformer.decoder.norm.weight"].shape[0]
    heads = {"sa_nheads": width // 32, "ca_nheads": width // 16} | dict(arguments)
    groups = count(weights, HEAD)
    scales = _scales(weights)
    samples = weights[f"{LAYERS}.0.cross_attn.attention_weights.weight"].shape[0]
    config: dict[str, Any] = {
        "d_model": width,
        "c2f_num_blocks": count(weights, "backbone.0.projector.stages.0.0.m"),
        "group_detr": groups,
        "num_queries": weights["query_feat.weight"].shape[0] // groups,
        "decoder_layers": count(weights, LAYERS),
        "decoder_ffn_dim": weights[f"{LAYERS}.0.linear1.weight"].shape[0],
        "decoder_self_attention_heads": heads["sa_nheads"],
        "decoder_cross_attention_heads": heads["ca_nheads"],
        "decoder_n_points": samples // heads["ca_nheads"] // len(scales),
        "projector_scale_factors": scales,
        "num_feature_levels": len(scales),
        "layer_norm_eps": 1e-6,
        "dropout": 0.0,
    }
    if "backbone.0.encoder.patch_embed.proj.weight" in weights:
        return lwdetr.recipe_of(LW, config | {"backbone_config": _cae(weights, arguments)})
    backbone = _dinov2(weights, arguments)
    recipe = lwdetr.recipe_of(RF, config | {"backbone_config": backbone})
    side = int(
        arguments.get("resolution", PIXELS.get(backbone["patch_size"], backbone["image_size"]))
    )
    return recipe.model_copy(update={"data": recipe.data.replace(size=(side, side))})


def _scales(weights: Weights) -> list[float]:
    """How much finer each level is than the maps:
    what a transposed convolution makes is twice as fine, what a 3x3 convolution makes half."""
    scales = []
    for level in range(count(weights, "backbone.0.projector.stages")):
        first = f"backbone.0.projector.stages_sampling.{level}.0.0"
        kernel = weights.get(f"{first}.conv.weight", weights.get(f"{first}.weight"))
        scales.append(1.0 if kernel is None else 0.5 if kernel.shape[-1] == 3 else 2.0)
    return scales


def _cae(weights: Weights, arguments: Config) -> dict[str, Any]:
    vit = "backbone.0.encoder"
    width, _, _, patch = weights[f"{vit}.patch_embed.proj.weight"].shape
    depth = count(weights, f"{vit}.blocks")
    grid = round((weights[f"{vit}.pos_embed"].shape[1] - 1) ** 0.5)
    taps = arguments.get("out_feature_indexes") or TAPS.get(depth, (depth - 1,))
    windowed = arguments.get("window_block_indexes") or WINDOWED.get(depth, ())
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "patch_size": patch,
        "pretrain_image_size": grid * patch,
        "window_block_indices": [int(block) for block in windowed],
        "out_indices": [int(block) % depth + 1 for block in taps],
        "drop_path_rate": float(arguments.get("drop_path", 0)),
    }


def _dinov2(weights: Weights, arguments: Config) -> dict[str, Any]:
    vit = "backbone.0.encoder.encoder"
    width, _, _, patch = weights[f"{vit}.embeddings.patch_embeddings.projection.weight"].shape
    grid = round((weights[f"{vit}.embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    stages = arguments.get("out_feature_indexes") or STAGES.get(patch, STAGES[16])
    return {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": count(weights, f"{vit}.encoder.layer"),
        "patch_size": patch,
        "image_size": grid * patch,
        "num_windows": int(arguments.get("num_windows", WINDOWS.get(patch, 2))),
        "out_features": [f"stage{stage}" for stage in stages],
    }


def class_count(weights: Weights, detector: DetectorConfig) -> int:
    """Classes that the weights distinguish."""
    return weights["class_embed.weight"].shape[0]


def loaded(weights: Weights, detector: DetectorConfig) -> Loaded:
    """The first group's tensors, under the authors' names."""
    return Loaded(
        lwdetr_names.completed(weights, detector.queries.count),
        lwdetr_names.authors_table(detector),
    )


REPOSITORY = Repository(
    "LW-DETR and RF-DETR", lwdetr_names.is_authors, recipe_of, class_count, loaded
)
