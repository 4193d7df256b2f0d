"""Every field of a recipe with every kind of nonsense:
it builds, or there is one clear error that names the field.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from detrellis.data.classes import ClassMap
from detrellis.engine.card import Card
from detrellis.errors import UserError
from detrellis.fields import Config, configs_of, kind_of
from detrellis.recipes import network
from detrellis.recipes.build import build
from detrellis.recipes.config import Recipe
from detrellis.recipes.refuse import refuse

from ..small import CLASSES, small

NO_NUMBERS = (float("inf"), float("nan"), 1e30, 10**40)  # nothing takes them
NONSENSE: tuple[Any, ...] = (
    *(*NO_NUMBERS, -1, 0, 1, 0.5, 1.5),
    *("", "nonsense", True, None, {}, {"nonsense": 1}),
    *([], [1], [8, 16, 32, 64, 128], [0.5, 0.2], ["text"]),
)


def fields(config: type[Config], prefix: str = "", kind: str = "") -> Iterator[tuple[str, str]]:
    """The dotted names of all fields, and what `kind` they belong to,
    where they belong to one of several.
    """
    for name, field in config.model_fields.items():
        kinds = configs_of(field.annotation)
        yield prefix + name, kind
        for inner in kinds:
            own = f"{prefix}{name}.kind={kind_of(inner)}" if len(kinds) > 1 else kind
            yield from fields(inner, f"{prefix}{name}.", own)


def with_value(recipe: Recipe, place: str, value: Any) -> Recipe:
    data = recipe.model_dump()
    *parents, name = place.split(".")
    inside = data
    for parent in parents:
        inside[parent] = inside.get(parent) or {}
        inside = inside[parent]
    inside[name] = value
    return Recipe.checked(data)


BASE = small("tiny").override(["data.size=[64, 64]"])
# A recipe that has what the field's kind names; of all others BASE has.
OTHERS = {
    "detector.encoder.kind=dense": "dab_detr_r50",
    "detector.encoder.kind=intra_scale": "smca_detr_ms_r50",
    "detector.encoder.kind=hybrid": "rtdetr_r18",
    "detector.encoder.kind=salience": "salience_detr_r50",
    "detector.backbone.kind=window_vit": "lwdetr_tiny",
    "detector.backbone.kind=eva02": "co_dino_vit_l",
    "detector.encoder.kind=projector": "lwdetr_tiny",
    "detector.queries.kind=learned": "deformable_detr_r50",
    "detector.queries.kind=anchors": "dab_detr_r50",
    "detector.queries.kind=proposals": "deformable_detr_r50_two_stage",
    "detector.cross_attention.kind=dense": "smca_detr_r50",
    "detector.cross_attention.kind=conditional": "dab_detr_r50",
    "detector.cross_attention.kind=semantic": "sam_detr_r50_smca",
    "detector.cross_attention.kind=masked": "mask2former_r50",
}


@cache
def base_of(kind: str) -> Recipe:
    if kind == "detector.backbone.kind=timm_vit":
        return BASE.override([kind, "detector.backbone.name=test_vit"])
    if kind not in OTHERS:
        assert not kind or BASE.override(kind) == BASE
        return BASE
    return small(OTHERS[kind], ["none"]).override(["data.size=[64, 64]"])


def refusal(base: Recipe, place: str, value: Any) -> str | None:
    """What is said against the value; None where the recipe builds with it."""
    try:
        recipe = with_value(base, place, value)
        assert not any(value is odd for odd in NO_NUMBERS)
        if recipe.model_copy(update={"data": base.data, "schedule": base.schedule}) == base:
            refuse(recipe)  # the network is the same
        else:
            with torch.device("meta"):
                build(recipe.untrained(), CLASSES)
    except UserError as error:
        return f"{error.message} {error.remedy}"
    return None


@pytest.fixture(autouse=True, scope="module")
def one_backbone() -> Iterator[None]:
    """Most of a build is its backbone, which few fields change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "build_backbone", cache(network.build_backbone))
        yield


@pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")
@pytest.mark.parametrize(("place", "kind"), fields(Recipe))
def test_a_value_fits_or_is_refused_by_name(place: str, kind: str) -> None:
    name, *parents = reversed(place.split("."))
    for value in NONSENSE:
        said = refusal(base_of(kind), place, value)
        assert said is None or any(part in said for part in (name, *parents[:1], *parents[:-1])), (
            value,
            said,
        )


def test_a_stored_recipe_that_no_longer_fits_is_one_clear_error(tmp_path: Path) -> None:
    metadata = Card(BASE, ClassMap((1,), ("cat",)), {}, 0, False).to_metadata()
    assert Card.from_metadata(metadata, tmp_path).recipe == BASE
    metadata["detrellis"] = metadata["detrellis"].replace('"points": 4', '"points": 0')
    with pytest.raises(
        UserError, match=r"detector\.encoder\.points=0 has to be at least 1"
    ) as error:
        Card.from_metadata(metadata, tmp_path)
    assert str(tmp_path) in str(error.value)
