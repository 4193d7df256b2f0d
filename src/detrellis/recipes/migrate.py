"""The reader of stored recipes:
cards, states, plans and trials of studies, also those that older versions wrote.

What stores a recipe stores `FORMAT` beside it. A field that moves or is called otherwise gets a
line in `RENAMED`; what takes more than a new name gets a function of its own in `migrated`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from detrellis.errors import UserError
from detrellis.fields import configs_of, kind_of
from detrellis.recipes.backbones import RESNETS
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig

FORMAT = 6  # of stored recipes

# Where a field of an older format stands now, as dotted paths. A name of today must not stand on
# the left.
RENAMED: Mapping[str, str] = {
    "detector.encoder.checkpointing": "optim.checkpointing",
    "schemes.co.most": "schemes.co.max_queries",
    "schemes.co.heads": "schemes.co.head_weight",
    "schemes.co.queries": "schemes.co.query_weight",
}

# Parameters of schemes, which the states of older runs hold: a part of a name then, and now.
RENAMED_PARAMETERS: Mapping[str, str] = {".judge.": ".quality.", ".read.": ".tower."}


def read_recipe(data: Any, written: int) -> Recipe:
    """The recipe that is stored as `data` by a version of format `written`;
    `UserError` where it does not fit.
    """
    try:
        recipe = migrated(data, written)
    except (TypeError, AttributeError):  # something else where parts of a recipe stood then
        raise UserError(
            f"no recipe of format {written}", "Take another copy of the file."
        ) from None
    return Recipe.checked(recipe)


def migrated(data: Any, written: int) -> Any:
    """A stored recipe as this version writes it;
    what is none stays as it is, for the check that follows.
    """
    if written >= FORMAT or not isinstance(data, Mapping):
        return data
    recipe: dict[str, Any] = deepcopy(dict(data))
    for old, new in RENAMED.items():
        _move(recipe, old, new)
    if written < 2 and isinstance(recipe.get("detector"), dict):
        _group_detector(recipe["detector"])
    if written < 3:
        _name_statistics(recipe)
    if written < 4:
        _name_content(recipe)
    if written < 5:
        _name_backbone(recipe)
    return recipe


def _name_statistics(recipe: dict[str, Any]) -> None:
    """Before format 3, pictures were normalised with ImageNet's statistics whatever a timm
    backbone's own are.
    """
    data, detector = recipe.get("data"), recipe.get("detector")
    backbone = detector.get("backbone") if isinstance(detector, dict) else None
    if (
        isinstance(data, dict)
        and isinstance(backbone, dict)
        and backbone.get("name", RESNETS[0]) not in RESNETS
    ):
        recipe["data"] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)} | data


def _name_content(recipe: dict[str, Any]) -> None:
    """Before format 4, `features` told contents that are tokens from learned ones."""
    detector = recipe.get("detector")
    queries = detector.get("queries") if isinstance(detector, dict) else None
    if isinstance(queries, dict) and queries.pop("features", False):
        queries["content_from"] = "memory"


def _name_backbone(recipe: dict[str, Any]) -> None:
    """Before format 5, there was one kind of backbone."""
    detector = recipe.get("detector")
    backbone = detector.get("backbone") if isinstance(detector, dict) else None
    if isinstance(backbone, dict):
        backbone["kind"] = "hierarchical"


def renamed_parameters(state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's stored state with the names of parameters that this version has."""
    renamed = {}
    for name, value in state.items():
        for old, new in RENAMED_PARAMETERS.items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def _group_detector(detector: dict[str, Any]) -> None:
    """Format 1 had the fields of all kinds of encoder, queries and attention in one flat list."""

    def take(**names: str) -> dict[str, Any]:
        return {new: detector.pop(old) for new, old in names.items() if old in detector}

    scaled = take(position_scale="position_scale")
    decoder = take(
        layers="decoder_layers",
        heads="heads",
        hidden="hidden",
        refine="refine",
        final_norm="final_norm",
    )
    decoder |= take(shared_heads="shared_heads")
    attention = take(kind="cross_attention", points="points", smca="smca") | detector.pop(
        "aligner", {}
    )
    queries = take(
        kind="queries", count="query_count", position="query_position", content="content"
    )
    for name in (
        "patterns",
        "indicator",
        "fixed_centres",
        "frozen_boxes",
        "proposal_targets",
        "empty_compete",
    ):
        queries |= take(**{name: name})
    of_encoder = take(
        kind="encoder", layers="encoder_layers", levels="levels", neck_norm="neck_norm"
    )
    of_encoder |= take(heads="encoder_heads", hidden="encoder_hidden", points="encoder_points")
    # What the encoder left open was as in the decoder; no norm of a single map was told was none.
    encoder = (
        decoder
        | attention
        | scaled
        | {name: value for name, value in of_encoder.items() if value is not None}
    )
    if queries.get("position") == "boxes":
        attention |= scaled
    detector["decoder"] = decoder
    for name, part in (("encoder", encoder), ("cross_attention", attention), ("queries", queries)):
        detector[name] = _as_kind(name, part)


def _as_kind(name: str, part: dict[str, Any]) -> dict[str, Any]:
    """What a part's kind reads of its fields;
    in format 1 all others had to be left at their defaults, or were idle.
    """
    kinds = configs_of(DetectorConfig.model_fields[name].annotation)
    fields = {kind_of(config): config.model_fields for config in kinds}.get(
        part.get("kind", ""), part
    )
    return {field: value for field, value in part.items() if field in fields}


def _move(data: dict[str, Any], old: str, new: str) -> None:
    """Move what stands at one dotted path to another.
    Nothing happens where a part of the old path is not there.
    """
    *parents, name = old.split(".")
    source: Any = data
    for parent in parents:
        source = source.get(parent) if isinstance(source, dict) else None
    if not isinstance(source, dict) or name not in source:
        return
    value = source.pop(name)
    *parents, name = new.split(".")
    target = data
    for parent in parents:
        target = target.setdefault(parent, {})
    target[name] = value
