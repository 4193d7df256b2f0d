"""Checkpoints of transformers: a `Family` for each model type that is read and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

# Written in another way, or told as a difference of no weight, by a family's `config_of`.
SAME = {
    "encoder.inner",
    "queries.distinct",
    "queries.empty_compete",
    "queries.content",
    "queries.patterns",
    "queries.indicator",
}


def kind_of(config: Config) -> str:
    """The model type of a `config.json`, one of those that ours can be."""
    kind = str(config.get("model_type", "")).replace("dab_detr", "dab-detr")
    if kind not in FAMILIES:
        raise UserError(
            f"model_type {kind!r} is not one that Detrellis has", f"Known: {', '.join(FAMILIES)}."
        )
    return kind


def family_of(detector: DetectorConfig) -> str:
    """Their model type for a detector. `UserError` with the reason where they have none."""
    for kind_in in KINDS:
        if (kind := kind_in(detector)) is not None:
            return kind
    raise UserError(
        "this detector cannot be saved for transformers: it has no such model",
        f"It has {', '.join(family.about for family in FAMILIES.values())}, each with backbones "
        "of its own.",
    )


def recipe_of(config: Config) -> Recipe:
    """The recipe that a `config.json` describes: its family's, with the file's sizes."""
    return FAMILIES[kind_of(config)].recipe_of(config)


def config_of(recipe: Recipe, names: Mapping[int, str]) -> dict[str, Any]:
    """Their `config.json` for a recipe whose classes are called `names`.

    `UserError` for a detector with parts that their model does not have: what it says has to be
    read as the same one.
    """
    kind = family_of(recipe.detector)
    described = FAMILIES[kind].config_of(recipe)
    theirs = FAMILIES[kind].recipe_of(described | {"model_type": kind})
    for name, here, there in _unlike(recipe.detector, theirs.detector):
        raise UserError(
            f"this detector cannot be saved for transformers: {name}={here}, theirs is {there}"
        )
    if recipe.data.pad is not None:
        raise UserError(
            f"data.pad={recipe.data.pad} cannot be saved for transformers: this detector reads "
            "padding as a part of the picture, and its boxes are relative to both"
        )
    return described | {
        "architectures": [FAMILIES[kind].model],
        "model_type": kind,
        "id2label": {str(i): name for i, name in names.items()},
        "label2id": {name: i for i, name in names.items()},
        "dtype": "float32",
    }


def _unlike(detector: DetectorConfig, theirs: DetectorConfig) -> Iterator[tuple[str, Any, Any]]:
    """Fields that decide what the network computes, with two values;
    not those that two values may say the same of.
    """
    for part in ("encoder", "queries", "cross_attention", "decoder", "masks"):
        here, there = getattr(detector, part), getattr(theirs, part)
        if here is None or there is None:
            if here is not there:
                yield part, here, there
            continue
        for field in type(here).model_fields:
            name, values = f"{part}.{field}", (getattr(here, field), getattr(there, field, None))
            if name not in SAME and values[0] != values[1]:
                yield name, *values
