"""Recipes at a size that a test can run, and batches to feed them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.recipes import RECIPES, Recipe, find_recipe
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.overrides import merged
from detrellis.types import ImageBatch, Targets

Key = TypeVar("Key")
CLASSES = 5
# On timm's smallest ResNet: maps of the same strides, at an eighth of a ResNet-18's time. It is
# never dilated.
SMALL = [
    "detector.backbone.name=test_resnet",
    "detector.backbone.pretrained=false",
    "detector.backbone.norm=auto",
    "detector.backbone.frozen=0",
    "detector.backbone.dilation=false",
    "detector.width=64",
    "detector.encoder.layers=1",
    "detector.encoder.heads=4",
    "detector.encoder.hidden=64",
    "detector.decoder.layers=2",
    "detector.decoder.heads=4",
    "detector.decoder.hidden=64",
    "detector.queries.count=12",
    "detector.top_k=20",
    "optim.ema=0.9",
    "optim.amp=false",  # the same numbers on all CPUs
]
# Of a plain ViT with a pyramid.
SMALL_EVA = [
    *(
        f"detector.backbone.{name}"
        for name in ("pretrained=false", "frozen=0", "width=32", "depth=2", "heads=2")
    ),
    *(
        f"detector.backbone.{name}"
        for name in ("window=3", "global_blocks=[1]", "grid=3", "extent=null")
    ),
    "detector.backbone.drop_path=0.1",
]
# Of a plain ViT, which has no encoder behind it.
SMALL_VIT = [
    "detector.backbone.pretrained=false",
    "detector.backbone.width=24",
    "detector.backbone.heads=3",
    "detector.backbone.grid=4",
    "detector.backbone.windows=2",
    "detector.backbone.windowed=[0]",
    "detector.backbone.taps=[1, 2]",
    "detector.decoder.cross_heads=8",
]
NAMES = [name.replace("-", "_") for name in RECIPES]
# One recipe of each kind of network: what any scheme may be stacked on.
NETWORKS = (
    "mask2former_r50",
    "tiny",
    "detr_r50",
    "conditional_detr_r50",
    "dab_detr_r50",
    "dn_detr_r50",
    "deformable_detr_r50",
    "deformable_detr_r50_two_stage",
    "deformable_detr_r50_two_stage_plus",
    "dab_deformable_detr_r50",
    "dn_deformable_detr_r50",
    "sam_detr_r50",
    "sam_detr_plus_r50_smca_dn",
    "smca_detr_r50",
    "rtdetr_r18",
    "dfine_s",
)


def small(name: str, schemes: Sequence[str] = ()) -> Recipe:
    """The recipe of that name, made small; its own schemes unless `schemes` says otherwise."""
    return shrink(find_recipe(name).with_schemes(schemes))


def shrink(recipe: Recipe) -> Recipe:
    """The same network parts and schemes at the size of the tests."""
    encoder, decoder = recipe.detector.encoder, recipe.detector.decoder
    plain = encoder.kind == "projector"
    common = [text for text in SMALL if not text.startswith("detector.backbone.")]
    if plain:
        recipe = recipe.override(
            [*SMALL_VIT, *(text for text in common if not text.startswith("detector.encoder."))]
        )
    else:
        recipe = recipe.override(
            [*SMALL_EVA, *common] if recipe.detector.backbone.kind == "eva02" else SMALL
        )
    # An encoder keeps hidden units of its own
    if encoder.kind != "projector" and encoder.hidden != decoder.hidden:
        recipe = recipe.override(f"detector.encoder.hidden={encoder.hidden}")
    if encoder.kind == "hybrid":
        recipe = recipe.override(["detector.encoder.blocks=1", "detector.encoder.expansion=0.5"])
        if encoder.inner is not None:
            recipe = recipe.override("detector.encoder.inner=96")
    if recipe.schemes.group is not None:
        recipe = recipe.override(f"schemes.group.k={min(recipe.schemes.group.k or 3, 3)}")
    # Which differ in nothing but their number
    if recipe.schemes.cdn is not None and recipe.schemes.cdn.number > 100:
        recipe = recipe.override(["schemes.cdn.number=100", "schemes.cdn.box_noise=1.0"])
    if recipe.schemes.hybrid is not None:
        recipe = recipe.override("schemes.hybrid.queries=15")
    return recipe


def resized(config: DetectorConfig, **parts: Any) -> DetectorConfig:
    """The same network with other values: `resized(config, width=64, queries={"count": 12})`."""
    return DetectorConfig.checked(merged(config.model_dump(), parts))


def with_own_backbone(name: str, schemes: Sequence[str] = ()) -> Recipe:
    """The small recipe with the smallest backbone that has what its own has:
    a dilated last stage, dropped branches.
    """
    recipe, config = small(name, schemes), find_recipe(name).detector.backbone
    changes: dict[str, object] = {"name": "resnet18", "pretrained": False}
    if config.dilation:
        changes["name"] = "resnet50"
    if config.drop_path:
        changes |= {"name": "swin_tiny_patch4_window7_224", "drop_path": 0.1}
    backbone = config.model_copy(update=changes)
    return recipe.replace(detector=recipe.detector.replace(backbone=backbone))


def distinct(
    recipes: Mapping[Key, Recipe], parts: Sequence[str] = ("detector", "schemes", "loss")
) -> list[Key]:
    """One name of each kind, the first: recipes are of one kind if these parts of them are the
    same. All that a test builds of network, schemes and losses, from the first weights on, is then
    the same too."""
    kinds: dict[str, Key] = {}
    for name, recipe in recipes.items():
        kinds.setdefault(recipe.model_dump_json(include=set(parts)), name)
    return list(kinds.values())


def images(sizes: Sequence[tuple[int, int]] = ((64, 96), (64, 96)), seed: int = 0) -> ImageBatch:
    """Noise images of the given heights and widths, padded to the largest."""
    generator = torch.Generator().manual_seed(seed)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    pixels = torch.zeros(len(sizes), 3, height, width)
    padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        padding[i, :h, :w] = False
    return ImageBatch(pixels, padding if padding.any() else None)


def with_bitmaps(truth: Targets, batch: ImageBatch) -> Targets:
    """The targets with their boxes as bitmaps."""
    height, width = batch.pixels.shape[-2:]
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    edges = cxcywh_to_xyxy(truth.boxes)
    across, down = (
        (c > edges[:, i, None]) & (c < edges[:, i + 2, None]) for i, c in enumerate((x, y))
    )
    return truth._replace(bitmaps=down.unsqueeze(2) & across.unsqueeze(1))


def targets(sizes: Sequence[int], side: float | Tensor | None = None, seed: int = 0) -> Targets:
    """Random boxes; `side` fixes their width and height, of all or of each, `(total, 1)`."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    boxes = torch.rand(total, 4, generator=generator) * 0.4 + 0.2
    if side is not None:
        boxes[:, 2:] = side
    return Targets(torch.randint(CLASSES, (total,), generator=generator), boxes, tuple(sizes))
