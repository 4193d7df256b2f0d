"""Checkpoints of transformers: a `Family` for each model type that is read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detrellis.errors import UserError
from detrellis.interop import detr, dfine, lwdetr, mask2former_config, rtdetr
from detrellis.interop.family import Config, Family
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig

FAMILIES: dict[str, Family] = {
    **detr.FAMILIES,
    **rtdetr.FAMILIES,
    **lwdetr.FAMILIES,
    **dfine.FAMILIES,
    **mask2former_config.FAMILIES,
}
KINDS = (lwdetr.kind_of, dfine.kind_of, rtdetr.kind_of, mask2former_config.kind_of, detr.kind_of)


def kind_of(config: Config) -> str:
    """The model type of a `config.json`, one of those that ours can be."""
    kind = str(config.get("model_type", "")).replace("dab_detr", "dab-detr")
    if kind not in FAMILIES:
        raise UserError(f"model_type {kind!r} is not one that Detrellis has", f"Known: {', '.join(FAMILIES)}.")
    return kind


def family_of(detector: DetectorConfig) -> str:
    """Their model type for a detector. `UserError` with the reason where they have none."""
    for kind_in in KINDS:
        if (kind := kind_in(detector)) is not None:
            return kind
    raise UserError(
        "this detector cannot be saved for transformers: it has no such model",
        f"It has {', '.join(family.about for family in FAMILIES.values())}, each with backbones of its own.",
    )


def recipe_of(config: Config) -> Recipe:
    """The recipe that a `config.json` describes: its family's, with the file's sizes."""
    return FAMILIES[kind_of(config)].recipe_of(config)


def config_of(recipe: Recipe, names: Mapping[int, str]) -> dict[str, Any]:
    """Their `config.json` for a recipe whose classes are called `names`."""
    kind = family_of(recipe.detector)
    return FAMILIES[kind].config_of(recipe) | {
        "architectures": [FAMILIES[kind].model],
        "model_type": kind,
        "id2label": {str(i): name for i, name in names.items()},
        "label2id": {name: i for i, name in names.items()},
        "dtype": "float32",
    }
