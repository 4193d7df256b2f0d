"""What the verbs take, declared once for Python and the command line:
ranges of numbers, and the check of a call.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from detrellis.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Range:
    """The range of numbers that an argument may be, ends included."""

    low: int
    high: int | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value) and self.low <= value and (self.high is None or value <= self.high)
        )

    def __str__(self) -> str:
        return f"{self.low} or more" if self.high is None else f"from {self.low} to {self.high}"


Score = Annotated[float, Range(0, 1)]
Iou = Annotated[float, Range(0, 1)]
Epochs = Annotated[int, Range(1)]
BatchSize = Annotated[int, Range(1)]
Classes = Annotated[int, Range(1)]
Threads = Annotated[int, Range(1)]
Runs = Annotated[int, Range(1)]  # timed passes
Cells = Annotated[int, Range(1)]
Warmup = Annotated[int, Range(0)]
Workers = Annotated[int, Range(0)]
Index = Annotated[int, Range(0)]
Images = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]  # of bytes, pixels, ...
Port = Annotated[int, Range(0, 65535)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Auto = Literal["auto"]
Split = Literal["train", "val", "test"]
Metric = Literal["coco", "voc", "masks"]
Scale = Literal["tiny"]
LabelFormat = Literal["coco", "yolo", "voc", "csv", "labelstudio", "cvat"]


def limits(kind: Any) -> dict[str, Any]:
    """The range of one of the kinds above, as an option of the command line takes it."""
    (bounds,) = (part for part in kind.__metadata__ if isinstance(part, Range))
    return {"min": bounds.low, "max": bounds.high}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, refusing what its annotations do not allow with a `UserError`: an unknown
    keyword, by the nearest name; another type; a number outside its `Range`; a word that is none of
    a `Literal`'s."""

    @functools.wraps(function)
    def run(*positional: P.args, **named: P.kwargs) -> R:
        _check_call(function, positional, named)
        return function(*positional, **named)

    return run


def nearest(name: str, known: Sequence[str]) -> str:
    """A remedy for a misspelt word."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listed = f"Known: {', '.join(known)}."
    return f"Did you mean {close[0]!r}? {listed}" if close else listed


def _check_call(
    function: Callable[..., Any], positional: Sequence[Any], named: dict[str, Any]
) -> None:
    about, hints = function.__qualname__, _hints(function)
    for name, value in (dict(zip(hints, positional, strict=False)) | named).items():
        if name not in hints:
            raise UserError(f"{about}: unknown argument {name!r}", nearest(name, list(hints)))
        if remedy := _wrong(hints[name], value):
            raise UserError(f"{about}: {name}={_shown(value)}", remedy)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The hint of each argument; None where only a type checker knows it."""
    return {
        n: _evaluated(p.annotation, function)
        for n, p in inspect.signature(function).parameters.items()
    }


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    if not isinstance(annotation, str):
        return None if annotation is inspect.Parameter.empty else annotation
    try:
        return eval(annotation, inspect.unwrap(function).__globals__)
    except NameError:  # imported for type checkers alone
        return None


def _wrong(hint: Any, value: Any) -> str:
    """The remedy for a `value` that its hint does not allow;
    empty where it does, or where that cannot be told.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        remedies = {arm: _wrong(arm, value) for arm in get_args(hint)}
        allowed = "" in remedies.values()
        remedies.pop(types.NoneType, None)
        return "" if allowed else " Or: ".join(dict.fromkeys(remedies.values()))
    if origin is Annotated:
        limit = next((part for part in hint.__metadata__ if isinstance(part, Range)), None)
        return "" if limit is None else _wrong_number(hint.__origin__, limit, value)
    if origin is Literal:
        words = get_args(hint)
        if any(value is word or value == word for word in words):
            return ""
        return (
            nearest(value, words)
            if isinstance(value, str)
            else f"Known: {', '.join(map(str, words))}."
        )
    if hint in (int, float):
        return _wrong_number(hint, None, value)
    if isinstance(origin, type):  # Sequence[str], Mapping[str, Any], ...
        fits = isinstance(value, origin) and not (
            issubclass(origin, Iterable) and isinstance(value, str | bytes)
        )
        return "" if fits else f"Give {_named(origin)}."
    if isinstance(hint, type):
        fits = isinstance(value, os.PathLike if hint.__name__ == "Path" else hint)
        return "" if fits else f"Give {_named(hint)}."
    return ""


def _wrong_number(kind: type, limit: Range | None, value: Any) -> str:
    number = numbers.Integral if kind is int else numbers.Real
    fits = isinstance(value, number) and not isinstance(value, bool)
    if fits and (value in limit if limit is not None else math.isfinite(value)):
        return ""
    return (
        "Give "
        f"{'a whole number' if kind is int else 'a number'}{'' if limit is None else f', {limit}'}."
    )


def _named(kind: type) -> str:
    names = {
        "str": "text",
        "bool": "True or False",
        "Path": "a path",
        "NoneType": "None",
        "Callable": "a function",
    }
    return names.get(
        kind.__name__, f"a {kind.__name__}" if kind.__module__ != "collections.abc" else "a list"
    )


def _shown(value: Any) -> str:
    """Short, on one line: arrays can be long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
