"""Co-DETR's own checkpoints of Co-DINO on EVA-02's ViT-L, in mmdetection's names.

A state dict says its sizes by its shapes. What no shape tells of the ViT is that of the released
models: those with 900 queries read squares, in windows of 16 cells, and know one class list or
another; those with 1500 read images of any shape, in windows of 24.
"""

from __future__ import annotations

import math

from detrellis.interop.family import Loaded, Repository, Weights
from detrellis.interop.links import Pair
from detrellis.interop.names import layer_count, mmcv_layers
from detrellis.recipes.backbones import EvaViTConfig
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.vit import co_dino_vit_l, co_dino_vit_l_lvis, co_dino_vit_l_objects365_lsj

HEAD = "query_head"
TRANSFORMER = f"{HEAD}.transformer"
CLASSES = f"{HEAD}.cls_branches"
CHANNELS = 64  # of a head of every EVA-02
SQUARE_QUERIES = 900
LVIS_CLASSES = 1203


def holds(weights: Weights) -> bool:
    """Whether the names are those of a Co-DINO on EVA-02's ViT."""
    return (
        f"{TRANSFORMER}.query_embed.weight" in weights
        and "backbone.blocks.0.mlp.ffn_ln.weight" in weights
    )


def recipe_of(weights: Weights) -> Recipe:
    """The recipe of the network that the state dict holds, with the dict's sizes."""
    queries, width = weights[f"{TRANSFORMER}.query_embed.weight"].shape
    recipe = co_dino_vit_l()
    if queries == SQUARE_QUERIES:
        lvis = weights[f"{CLASSES}.0.weight"].shape[0] == LVIS_CLASSES
        recipe = co_dino_vit_l_lvis() if lvis else co_dino_vit_l_objects365_lsj()
    backbone = recipe.detector.backbone
    encoder = recipe.detector.encoder
    decoder = recipe.detector.decoder
    assert isinstance(backbone, EvaViTConfig)
    cells, channels = weights["backbone.pos_embed"].shape[1:]
    depth = layer_count(weights, "backbone.blocks")
    inner = {
        part: weights[f"{TRANSFORMER}.{part}.layers.0.ffns.0.layers.0.0.weight"].shape[0]
        for part in ("encoder", "decoder")
    }
    layers = {
        part: layer_count(weights, f"{TRANSFORMER}.{part}.layers")
        for part in ("encoder", "decoder")
    }
    sizes = {
        "width": channels,
        "depth": depth,
        "heads": channels // CHANNELS,
        "grid": math.isqrt(cells - 1),
    }
    whole = tuple(i for i in backbone.global_blocks if i < depth)
    detector = recipe.detector.replace(
        backbone=backbone.untrained().replace(**sizes, global_blocks=whole),
        width=width,
        encoder=encoder.replace(layers=layers["encoder"], hidden=inner["encoder"]),
        decoder=decoder.replace(layers=layers["decoder"], hidden=inner["decoder"]),
        queries=recipe.detector.queries.replace(count=queries, empty_compete=True),
    )
    return recipe.replace(detector=detector)


def names(detector: DetectorConfig) -> list[Pair]:
    """The detector's tensors; those of auxiliary heads and of denoising have no place in it."""
    last = detector.decoder.layers
    boxes = f"{HEAD}.reg_branches"
    return [
        Pair("backbone.@", "backbone.@"),
        Pair("neck.pyramid.@", "neck.@"),
        Pair("neck.neck.level_embed", f"{TRANSFORMER}.level_embeds"),
        *mmcv_layers(TRANSFORMER),
        *(
            Pair(
                f"decoder.position.mlp.layers.{k}", f"{TRANSFORMER}.decoder.ref_point_head.{2 * k}"
            )
            for k in range(2)
        ),
        Pair("queries.content", f"{TRANSFORMER}.query_embed.weight"),
        Pair("queries.head.classify", f"{CLASSES}.{last}"),
        *(Pair(f"queries.head.move.layers.{k}", f"{boxes}.{last}.{2 * k}") for k in range(3)),
        Pair("decoder.heads.classes.*", f"{CLASSES}.*"),
        *(Pair(f"decoder.heads.boxes.*.layers.{k}", f"{boxes}.*.{2 * k}") for k in range(3)),
    ]


REPOSITORY = Repository(
    "Co-DETR's Co-DINO on EVA-02's ViT-L",
    holds,
    lambda weights, arguments: recipe_of(weights),
    lambda weights, detector: weights[f"{CLASSES}.0.weight"].shape[0],
    lambda weights, detector: Loaded(dict(weights), names(detector)),
)
