"""What every config is: typed, frozen, closed to unknown names; and the ranges of its numbers.

Types are strict: a yes or no is no number, and text is neither. Every number has a range, so that
no value that is infinite, not a number or absurd gets as far as a network.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from detrellis.errors import UserError, brief, cut


def within(low: float, high: float, *, above: bool = False, below: bool = False) -> WrapValidator:
    """The range of a number, for `Annotated`: `above` and `below` leave its ends out."""
    lower, upper = "above" if above else "at least", "below" if below else "at most"
    span = f"{lower} {low:,g} and {upper} {high:,g}".replace(",", " ")

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            number = handler(value)
        except ValidationError as error:
            whole = error.errors()[0]["type"].startswith("int")
            raise PydanticCustomError(
                "range", f"has to be a {'whole ' if whole else ''}number {span}"
            ) from None
        if (number > low if above else number >= low) and (
            number < high if below else number <= high
        ):
            return number
        raise PydanticCustomError("range", f"has to be {span}")

    return WrapValidator(check)


def _ascending(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if any(one >= other for one, other in pairwise(values)):
        raise PydanticCustomError("order", "has to ascend, each number once")
    return values


def _some(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise PydanticCustomError("empty", "has to name at least one")
    return values


Ascending = AfterValidator(_ascending)
Some = AfterValidator(_some)

Count = Annotated[int, within(1, 1_000_000)]
CountOrNone = Annotated[int, within(0, 1_000_000)]  # 0: off
# Layers, heads, levels, points, groups: each costs as much as the one before
Few = Annotated[int, within(1, 100)]
Positive = Annotated[float, within(0, 1e6, above=True)]
ZeroToOne = Annotated[float, within(0, 1)]
# Of something that must not be lost altogether
ZeroToBelowOne = Annotated[float, within(0, 1, below=True)]
Weight = Annotated[float, within(0, 1e6)]
Width = Annotated[int, within(4, 8192)]  # channels
Strides = Annotated[tuple[Count, ...], Ascending, Some]
Key = Annotated[str, StringConstraints(min_length=1)]

# What pydantic calls what does not fit, in the words of who wrote it.
WORDS = {
    "bool_type": "has to be true or false",
    "string_type": "has to be text",
    "string_too_short": "has to be text, and not empty",
    "tuple_type": "has to be a list, such as [1, 2]",
    "dict_type": "has to be a mapping, such as {name: value}",
    "model_type": "has to be a mapping of its parts, such as {name: value}",
    "model_attributes_type": "has to be a mapping of its parts, such as {kind: name}",
    "missing": "is missing",
}
# Where pydantic lists what fits
EXPECTED = {"literal_error": "expected", "union_tag_invalid": "expected_tags"}


class Config(BaseModel):
    """Frozen, strict, and closed to unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, data: Any) -> Any:
        """JSON and YAML have lists where a recipe has tuples."""
        if not isinstance(data, dict):
            return data
        return {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }

    @classmethod
    def checked(cls, data: dict[str, Any]) -> Self:
        """From plain data; `UserError` for a value that does not fit,
        naming the field, the value and what fits.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(_said(cls, error.errors()[0])) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked as in `checked`."""
        return self.checked({**dict(self), **changes})


def configs_of(annotation: Any) -> tuple[type[Config], ...]:
    """The configuration classes behind a field's annotation:
    none, one (that may be None), or one for each kind.
    """
    options = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    return tuple(
        option for option in options if isinstance(option, type) and issubclass(option, Config)
    )


def kind_of(config: type[Config]) -> str:
    """What `kind` is in the data of a class that is one of several."""
    return str(config.model_fields["kind"].default)


def _place(config: type[Config], path: Sequence[str | int]) -> str:
    """The dotted name of a place in a configuration.
    In pydantic's path the kind follows where there are several.
    """
    names: list[str] = []
    kinds: tuple[type[Config], ...] = (config,)
    for part in path:
        if len(kinds) > 1:
            kinds = tuple(kind for kind in kinds if kind_of(kind) == part)
            continue
        names.append(str(part))
        field = kinds[0].model_fields.get(str(part)) if kinds else None
        kinds = () if field is None else configs_of(field.annotation)
    return ".".join(names)


def _said(config: type[Config], error: ErrorDetails) -> str:
    place, given = cut(_place(config, error["loc"])), error["input"]
    value = list(given) if isinstance(given, tuple) else given  # as it was written
    if error["type"] == "missing":
        return f"{place} {WORDS['missing']}"
    if error["type"] == "union_tag_not_found":
        return f"{place}.kind {WORDS['missing']}"
    if error["type"] == "union_tag_invalid":
        place, value = f"{place}.kind", error["ctx"]["tag"]
    if error["type"] == "extra_forbidden":
        return f"there is no field {place}"
    wanted = WORDS.get(error["type"], error["msg"].lower().replace("input should be", "has to be"))
    if error["type"] in EXPECTED:
        known = error.get("ctx", {})[EXPECTED[error["type"]]].replace("'", "")
        wanted = f"has to be one of {known}" + nearest(
            str(value), known.replace(" or ", ", ").split(", ")
        )
    return f"{place}={brief(value)} {wanted}"


def nearest(name: str, known: Sequence[str]) -> str:
    """` (did you mean X?)` where a known name is close, else nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def unknown_name(name: str, known: Sequence[str], where: str) -> UserError:
    """The error for a name that does not exist, with the nearest ones that do."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
    return UserError(f"{where}: there is no {brief(name)}", remedy)


def _points(value: Any) -> Any:
    counts = (
        [value]
        if isinstance(value, int)
        else list(value)
        if isinstance(value, list | tuple)
        else []
    )
    if counts and all(
        isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= 100 for n in counts
    ):
        return value if isinstance(value, int) else tuple(counts)
    raise PydanticCustomError(
        "points", "has to be a whole number from 1 to 100, or a list of one a level: [3, 6, 3]"
    )


Points = Annotated[int | tuple[int, ...], BeforeValidator(_points)]
