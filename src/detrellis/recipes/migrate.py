"""The reader of stored recipes: cards, states, plans and trials of studies, also those that older versions wrote.

What stores a recipe stores `FORMAT` beside it. A field that moves or is called otherwise gets a line in `RENAMED`; what
takes more than a new name gets a function of its own in `migrated`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from detrellis.recipes.config import Recipe

FORMAT = 1  # of stored recipes; 2 with the first field below

# Where a field of format 1 stands in format 2, as dotted paths: "schemes.co.old": "schemes.co.new".
RENAMED: Mapping[str, str] = {}


def read_recipe(data: Any, written: int) -> Recipe:
    """The recipe that is stored as `data` by a version of format `written`; `UserError` where it does not fit."""
    return Recipe.checked(migrated(data, written))


def migrated(data: Any, written: int) -> Any:
    """A stored recipe as this version writes it; what is none stays as it is, for the check that follows."""
    if written >= FORMAT or not isinstance(data, Mapping):
        return data
    recipe: dict[str, Any] = deepcopy(dict(data))
    for old, new in RENAMED.items():
        _move(recipe, old, new)
    return recipe


def _move(data: dict[str, Any], old: str, new: str) -> None:
    """Move what stands at one dotted path to another. Nothing happens where a part of the old path is not there."""
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
