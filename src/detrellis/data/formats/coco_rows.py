"""The rows of a COCO file as columns.
What one row has wrong is written down and never stops the others.

Each column has a fast way, for files in which every value is what it should be, and a slow one that
looks at each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrellis.data.files import kind
from detrellis.data.formats.segmentation import box_of
from detrellis.data.records import HUGE

Row = dict[str, Any]
Integers = NDArray[np.int64]
WHOLE = re.compile(r"\s*[+-]?\d{1,18}(\.0*)?\s*")
SHOWN = 60  # letters of a value that a message quotes


@dataclass
class CocoTable:
    """The rows of one table of a COCO file, and what is wrong or unusual in them."""

    name: str  # "images", "annotations" or "categories"
    rows: list[Row]
    # Place -> what is wrong, of rows that cannot be used
    wrong: dict[int, list[str]] = field(default_factory=dict)
    # Numbers that are written as texts, with their places
    numbers_as_text: list[str] = field(default_factory=list)
    text_ids: list[str] = field(default_factory=list)  # ids that are texts and no numbers
    without_id: list[str] = field(default_factory=list)  # rows without an id that they could keep
    # Place -> what stands where a box should be
    no_boxes: dict[int, str] = field(default_factory=dict)
    outlined: list[int] = field(default_factory=list)  # places whose box is their segmentation's

    def at(self, place: int) -> str:
        """The row as messages name it: `annotations[4] (id 17)`."""
        row_id = self.rows[place].get("id")
        return f"{self.name}[{place}]{'' if row_id is None else f' (id {shown(row_id)})'}"

    def add_problem(self, place: int, what: str) -> None:
        """Writes down what is wrong with a row."""
        self.wrong.setdefault(place, []).append(what)

    def problem_with(self, place: int, key: str) -> str:
        """What is wrong with the value of `key` in a row."""
        row = self.rows[place]
        if key in row:
            return f"has {shown(row[key])} for `{key}`"
        return f"has no `{key}` (found: {', '.join(map(str, row))})"


def table_of(name: str, rows: Sequence[Any]) -> CocoTable:
    """The table of these rows; those that are no objects count as empty, and as wrong."""
    table = CocoTable(name, [row if isinstance(row, dict) else {} for row in rows])
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            table.add_problem(place, f"is {kind(row)}, not an object")
    return table


def row_ids(table: CocoTable, *, needed: bool) -> tuple[Integers, dict[str, int]]:
    """The `id`s of all rows, and the numbers that were given to those that are texts.

    A row without one gets a number of its own, and is wrong where its id is `needed`: nothing can
    refer to it.
    """
    if (fast := _fast(table.rows, "id")) is not None:
        return fast, {}
    ids = [_whole(table, place, "id") for place in range(len(table.rows))]
    highest = max((number for number in ids if number is not None), default=0)
    texts: dict[str, int] = {}
    for place, number in enumerate(ids):
        if number is not None:
            continue
        text = table.rows[place].get("id")
        if needed and isinstance(text, str) and text:
            if text not in texts:
                highest += 1
            ids[place] = texts.setdefault(text, highest)
            table.text_ids.append(text)
            continue
        highest += 1
        ids[place] = highest
        if not needed:
            table.without_id.append(f"{table.name}[{place}] {table.problem_with(place, 'id')}")
        elif table.rows[place] or place not in table.wrong:
            table.add_problem(place, table.problem_with(place, "id"))
    return np.array(ids, dtype=np.int64), texts


def rows_by_id(content: Mapping[str, Any], name: str) -> dict[int, Row]:
    """The rows of a table by the ids that `row_ids` gives them, the first of each."""
    table = table_of(name, content.get(name, []))
    ids, _ = row_ids(table, needed=True)
    return dict(zip(reversed(ids.tolist()), reversed(table.rows), strict=True))


def references(table: CocoTable, key: str, texts: Mapping[str, int]) -> Integers:
    """The ids of rows of another table that stand under `key`, whose texts became `texts`;
    -1 in wrong rows.
    """
    if (fast := _fast(table.rows, key)) is not None:
        return fast
    ids = []
    for place, row in enumerate(table.rows):
        number = texts.get(row[key]) if isinstance(row.get(key), str) else None
        if number is None:
            number = _whole(table, place, key)
        if number is None and row:
            table.add_problem(place, table.problem_with(place, key))
        ids.append(-1 if number is None else number)
    return np.array(ids, dtype=np.int64)


def file_name_of(row: Row) -> Any:
    """The `file_name`, or of LVIS, which has none,
    the last two parts of the `coco_url`: `train2017/9.jpg`.
    """
    value, url = row.get("file_name"), row.get("coco_url")
    return "/".join(url.split("/")[-2:]) if not value and isinstance(url, str) and url else value


def names(table: CocoTable) -> tuple[str, ...]:
    """The `file_name`s of the images; "" in wrong rows."""
    file_names = []
    for place, row in enumerate(table.rows):
        value = file_name_of(row)
        good = isinstance(value, str) and value.strip() != ""
        file_names.append(str(value) if good else "")
        if not good and row:
            table.add_problem(place, table.problem_with(place, "file_name"))
    return tuple(file_names)


def sizes(table: CocoTable) -> Integers:
    """`(I, 2)` height and width; 0 where they are missing or no whole numbers above 0."""
    columns = []
    for key in ("height", "width"):
        column = _fast(table.rows, key)
        if column is None:
            values = [_whole(table, place, key) or 0 for place in range(len(table.rows))]
            column = np.array(values, dtype=np.int64)
        columns.append(np.maximum(column, 0))
    return np.stack(columns, axis=1).reshape(-1, 2)


def boxes(table: CocoTable) -> NDArray[np.float64]:
    """`(T, 4)` the `bbox`es, those of the segmentations where there are none;
    NaN where there is neither.
    """
    try:
        values = np.array([row["bbox"] for row in table.rows])
        if (
            values.dtype.kind in "if"
            and values.shape == (len(table.rows), 4)
            and (np.abs(values) < HUGE).all()
        ):
            return values.astype(np.float64)
    except (KeyError, ValueError):
        pass
    rows = [_box(table, place) for place in range(len(table.rows))]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _box(table: CocoTable, place: int) -> list[float]:
    row = table.rows[place]
    value = row.get("bbox")
    if not value and (outlined := box_of(row.get("segmentation"))) is not None:
        table.outlined.append(place)
        return outlined
    four = value if isinstance(value, list) and len(value) == 4 else []
    numbers = [number for v in four if (number := _number(v)) is not None]
    if len(numbers) == 4:
        if any(isinstance(v, str) for v in four):
            table.numbers_as_text.append(f"{table.at(place)}: {shown(value)}")
        return numbers
    table.no_boxes[place] = "no `bbox`" if "bbox" not in row else shown(value)
    return [np.nan] * 4


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < HUGE else None


def areas(table: CocoTable) -> NDArray[np.float64]:
    """`(T,)` the `area`s in square pixels; NaN where one is missing or no positive number."""
    values = [row.get("area") for row in table.rows]
    try:
        column = np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        column = np.array([_number(value) or np.nan for value in values], dtype=np.float64)
    return np.where(np.isfinite(column) & (column > 0), column, np.nan)


def _fast(rows: list[Row], key: str) -> Integers | None:
    """The column where every value is a whole number: numpy has looked at every type."""
    try:
        values = np.array([row[key] for row in rows])
    except (KeyError, ValueError, OverflowError):
        return None
    return values.astype(np.int64) if values.dtype.kind == "i" and values.ndim == 1 else None


def _whole(table: CocoTable, place: int, key: str) -> int | None:
    """The whole number under `key`:
    3, 3.0 or "3", which is written down; None where there is none.
    """
    value = table.rows[place].get(key)
    if isinstance(value, str) and WHOLE.fullmatch(value):
        table.numbers_as_text.append(f"{table.at(place)}: {shown(value)} for `{key}`")
        return int(float(value)) if "." in value else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # NaN is not below anything
    return int(value) if abs(value) < 2**63 and int(value) == value else None


def keep_first(
    rows: Iterable[tuple[int, str]],
) -> tuple[list[tuple[int, str]], list[tuple[int, str]], dict[int, list[str]]]:
    """(id, name) rows, each id once; those that are there again;
    and the names of ids that have several.
    """
    first: dict[int, str] = {}
    repeated: list[tuple[int, str]] = []
    contradictions: dict[int, list[str]] = {}
    for row_id, name in rows:
        if row_id not in first:
            first[row_id] = name
        elif first[row_id].strip() == name.strip():
            repeated.append((row_id, name))
        else:
            contradictions.setdefault(row_id, [first[row_id]]).append(name)
    return list(first.items()), repeated, contradictions


def shown(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    text = "null" if value is None else f'"{value}"' if isinstance(value, str) else _spelt(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _spelt(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(shown(v) for v in value[:8])}{', ...' if len(value) > 8 else ''}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)
