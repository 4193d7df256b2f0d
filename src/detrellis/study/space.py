"""What a search may choose from:
ranges and choices for fields of a recipe, and for its training schemes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from detrellis.errors import UserError
from detrellis.recipes import Recipe
from detrellis.recipes.values import read_value
from detrellis.study.rows import parse_rows, with_exactly

SCHEMES = "schemes"  # a dimension of this name chooses among whole rows of schemes
RANGE = re.compile(r"(?P<low>[^,\[\]]+?)\.\.(?P<high>[^,\[\]]+?)(?P<log>:log)?")
FORMS = (
    "Write FIELD=LOW..HIGH, FIELD=LOW..HIGH:log or FIELD=A,B,C: --search optim.lr=1e-4..1e-3:log."
)
DIGITS = 4  # of a number that is drawn from a range


@dataclass(frozen=True)
class Dimension:
    """One field, and its range, `low` to `high`,
    or its choices as they are written on a command line.
    """

    field: str
    text: str  # as it was asked for
    low: int | float = 0
    high: int | float = 0
    log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the range has whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def extremes(self) -> tuple[Any, ...]:
        """The values that have to fit the recipe: all choices, or both ends of the range."""
        return self.choices or (self.low, self.high)


def parse_dimension(text: str) -> Dimension:
    """`"optim.lr=1e-4..1e-3:log"`, `"detector.decoder.layers=2..6"`,
    `"detector.queries.distinct=null,0.7"`, or `"schemes=none,align,group=3+align"`. Raises
    `UserError` for anything else."""
    field, separator, value = (part.strip() for part in text.partition("="))
    if not separator or not field or not value:
        raise UserError(f"--search {text}: no values", FORMS)
    if (matched := RANGE.fullmatch(value)) is not None:
        low, high = (_number(matched[end], text) for end in ("low", "high"))
        log = matched["log"] is not None
        if low >= high or (log and low <= 0):
            needed = (
                "a logarithmic range begins above 0"
                if log and low <= 0
                else "the first number is the lower one"
            )
            raise UserError(f"--search {text}: {needed}", FORMS)
        return Dimension(field, text, low, high, log)
    choices = (
        ["+".join(row) or "none" for row in parse_rows(value)]
        if field == SCHEMES
        else _split(value)
    )
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise UserError(f"--search {text}: a choice needs two or more values that differ", FORMS)
    return Dimension(field, text, choices=tuple(choices))


def parse_space(texts: Sequence[str], recipe: Recipe) -> tuple[Dimension, ...]:
    """All dimensions of a search.
    Raises `UserError` for a field that stands twice, and for values that the recipe refuses."""
    space = tuple(parse_dimension(text) for text in texts)
    if not space:
        raise UserError("--search: nothing to search", FORMS)
    fields = [dimension.field for dimension in space]
    for dimension in space:
        if fields.count(dimension.field) > 1:
            raise UserError(
                f"--search {dimension.text}: {dimension.field} stands twice",
                "Name each field once.",
            )
        for value in dimension.extremes():
            chosen(recipe, space, {dimension.field: value})
    return space


def chosen(recipe: Recipe, space: Sequence[Dimension], values: Mapping[str, Any]) -> Recipe:
    """The recipe with a value for some of the fields. Raises `UserError` where it refuses them."""
    if SCHEMES in values:
        recipe = with_exactly(recipe, parse_rows(str(values[SCHEMES]))[0])
    return recipe.override(assignments(space, values, recipe))


def assignments(space: Sequence[Dimension], values: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """What `-o` takes to set the values.
    The dial of a scheme counts only where the trial has that scheme.
    """
    dimensions = {dimension.field for dimension in space}
    texts = []
    for field, value in values.items():
        scheme = field.split(".")[1] if field.startswith(f"{SCHEMES}.") else None
        absent = (
            scheme is not None
            and SCHEMES in dimensions
            and getattr(recipe.schemes, scheme, None) is None
        )
        if field != SCHEMES and not absent:
            texts.append(f"{field}={value}")
    return texts


def rounded(value: Any) -> Any:
    """A drawn number with few digits, so that a command that repeats it is short."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _number(text: str, whole: str) -> int | float:
    try:
        value = read_value(text)
    except yaml.YAMLError:
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"--search {whole}: {text} is not a number", FORMS)
    return value


def _split(value: str) -> list[str]:
    """The parts between commas, but not within brackets: `"[1, 2], [3]"` has two."""
    return [
        part.strip()
        for part in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", value)
        if part.strip()
    ]
