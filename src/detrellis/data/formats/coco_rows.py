"""The rows of a COCO file as columns. What one row has wrong is written down and never stops the others.

Each column has a fast way, for files in which every value is what it should be, and a slow one that looks at each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrellis.data.formats.segmentation import box_of

Row = dict[str, Any]
Integers = NDArray[np.int64]
WHOLE = re.compile(r"\s*[+-]?\d{1,18}(\.0*)?\s*")
HUGE = 1e300
SHOWN = 60  # letters of a value that a message quotes


@dataclass
class Odd:
    """What is odd in the rows of one table."""

    table: str  # "images", "annotations" or "categories"
    rows: list[Row]
    wrong: dict[int, list[str]] = field(default_factory=dict)  # place -> what is wrong, of rows that cannot be used
    as_text: list[str] = field(default_factory=list)  # numbers that are written as texts, with their places
    named: list[str] = field(default_factory=list)  # ids that are texts and no numbers
    numbered: list[str] = field(default_factory=list)  # rows without an id that they could keep
    boxes: dict[int, str] = field(default_factory=dict)  # place -> what stands where a box should be
    outlined: list[int] = field(default_factory=list)  # places whose box is their segmentation's

    def at(self, place: int) -> str:
        """`annotations[4] (id 17)`."""
        own = self.rows[place].get("id")
        return f"{self.table}[{place}]{'' if own is None else f' (id {shown(own)})'}"

    def add(self, place: int, what: str) -> None:
        """Writes down what is wrong with a row."""
        self.wrong.setdefault(place, []).append(what)

    def missing(self, place: int, key: str) -> str:
        """What is wrong with the value of `key`."""
        row = self.rows[place]
        if key in row:
            return f"has {shown(row[key])} for `{key}`"
        return f"has no `{key}` (found: {', '.join(map(str, row))})"


def objects(table: str, rows: Sequence[Any]) -> Odd:
    """The rows of a table; those that are no objects count as empty, and as wrong."""
    odd = Odd(table, [row if isinstance(row, dict) else {} for row in rows])
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            odd.add(place, f"is {kind(row)}, not an object")
    return odd


def own_ids(odd: Odd, *, needed: bool) -> tuple[Integers, dict[str, int]]:
    """The `id`s, and what the texts among them became.

    A row without one gets a number of its own, and is wrong where its id is `needed`: nothing can refer to it.
    """
    if (fast := _fast(odd.rows, "id")) is not None:
        return fast, {}
    values = [_whole(odd, place, "id") for place in range(len(odd.rows))]
    after = max((v for v in values if v is not None), default=0)
    texts: dict[str, int] = {}
    for place, value in enumerate(values):
        if value is not None:
            continue
        text = odd.rows[place].get("id")
        if needed and isinstance(text, str) and text:
            if text not in texts:
                after += 1
            values[place] = texts.setdefault(text, after)
            odd.named.append(text)
            continue
        after += 1
        values[place] = after
        if not needed:
            odd.numbered.append(f"{odd.table}[{place}] {odd.missing(place, 'id')}")
        elif odd.rows[place] or place not in odd.wrong:
            odd.add(place, odd.missing(place, "id"))
    return np.array(values, dtype=np.int64), texts


def rows_by_id(content: Mapping[str, Any], table: str) -> dict[int, Row]:
    """The rows of a table by the ids that `own_ids` gives them, the first of each."""
    odd = objects(table, content.get(table, []))
    ids, _ = own_ids(odd, needed=True)
    pairs = zip(reversed(ids.tolist()), reversed(odd.rows), strict=True)
    return dict(pairs)


def references(odd: Odd, key: str, texts: Mapping[str, int]) -> Integers:
    """Ids of another table, whose texts became `texts`; -1 in rows that are wrong."""
    if (fast := _fast(odd.rows, key)) is not None:
        return fast
    found = []
    for place, row in enumerate(odd.rows):
        value = texts.get(row[key]) if isinstance(row.get(key), str) else None
        value = _whole(odd, place, key) if value is None else value
        if value is None and row:
            odd.add(place, odd.missing(place, key))
        found.append(-1 if value is None else value)
    return np.array(found, dtype=np.int64)


def names(odd: Odd) -> tuple[str, ...]:
    """The `file_name`s; "" in rows that are wrong."""
    found = []
    for place, row in enumerate(odd.rows):
        value = row.get("file_name")
        good = isinstance(value, str) and value.strip() != ""
        found.append(str(value) if good else "")
        if not good and row:
            odd.add(place, odd.missing(place, "file_name"))
    return tuple(found)


def sizes(odd: Odd) -> Integers:
    """(I, 2) height and width; 0 where they are missing or no whole numbers above 0."""
    columns = []
    for key in ("height", "width"):
        fast = _fast(odd.rows, key)
        values = [_whole(odd, place, key) or 0 for place in range(len(odd.rows))] if fast is None else fast
        columns.append(np.maximum(np.array(values, dtype=np.int64), 0))
    return np.stack(columns, axis=1).reshape(-1, 2)


def boxes(odd: Odd) -> NDArray[np.float64]:
    """(T, 4) the `bbox`es, those of the segmentations where there are none; NaN where there is neither."""
    try:
        values = np.array([row["bbox"] for row in odd.rows])
        if values.dtype.kind in "if" and values.shape == (len(odd.rows), 4):
            return values.astype(np.float64)
    except (KeyError, ValueError):
        pass
    found = [_box(odd, place) for place in range(len(odd.rows))]
    return np.array(found, dtype=np.float64).reshape(-1, 4)


def _box(odd: Odd, place: int) -> list[float]:
    row = odd.rows[place]
    value = row.get("bbox")
    if not value and (outlined := box_of(row.get("segmentation"))) is not None:
        odd.outlined.append(place)
        return outlined
    four = value if isinstance(value, list) and len(value) == 4 else []
    numbers = [number for v in four if (number := _number(v)) is not None]
    if len(numbers) == 4:
        if any(isinstance(v, str) for v in four):
            odd.as_text.append(f"{odd.at(place)}: {shown(value)}")
        return numbers
    odd.boxes[place] = "no `bbox`" if "bbox" not in row else shown(value)
    return [np.nan] * 4


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < HUGE else None


def areas(odd: Odd) -> NDArray[np.float64]:
    """(T,) NaN where `area` is missing or no positive number."""
    values = [row.get("area") for row in odd.rows]
    try:
        found = np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        found = np.array([_number(value) or np.nan for value in values], dtype=np.float64)
    return np.where(np.isfinite(found) & (found > 0), found, np.nan)


def _fast(rows: list[Row], key: str) -> Integers | None:
    """The column where every value is a whole number: numpy has looked at every type."""
    try:
        values = np.array([row[key] for row in rows])
    except (KeyError, ValueError, OverflowError):
        return None
    return values.astype(np.int64) if values.dtype.kind == "i" and values.ndim == 1 else None


def _whole(odd: Odd, place: int, key: str) -> int | None:
    """A whole number: 3, 3.0 or "3", which is written down."""
    value = odd.rows[place].get(key)
    if isinstance(value, str) and WHOLE.fullmatch(value):
        odd.as_text.append(f"{odd.at(place)}: {shown(value)} for `{key}`")
        return int(float(value)) if "." in value else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if abs(value) < 2**63 and int(value) == value else None  # NaN is not below anything


def keep_first(
    rows: Iterable[tuple[int, str]],
) -> tuple[list[tuple[int, str]], list[tuple[int, str]], dict[int, list[str]]]:
    """(id, name) rows, each id once; those that are there again; and the names of ids that have several."""
    first: dict[int, str] = {}
    again: list[tuple[int, str]] = []
    several: dict[int, list[str]] = {}
    for own, name in rows:
        if own not in first:
            first[own] = name
        elif first[own].strip() == name.strip():
            again.append((own, name))
        else:
            several.setdefault(own, [first[own]]).append(name)
    return list(first.items()), again, several


def shown(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    text = "null" if value is None else f'"{value}"' if isinstance(value, str) else _spelt(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _spelt(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(shown(v) for v in value[:8])}{', ...' if len(value) > 8 else ''}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def kind(value: Any) -> str:
    """What a JSON value is, in a word."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number"}
    return "null" if value is None else kinds.get(type(value), "a number")
