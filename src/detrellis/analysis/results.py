"""What measurements return: the values of several runs, as records, table and JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text
from torch import Tensor

from detrellis.engine.coco_eval import EvalResult

FIGURE_ONLY = ("example", "examples", "picture")  # fields that are drawn, and not written to the JSON


@dataclass(frozen=True)
class RunResult:
    """What every measurement says of one run; subclasses add their values."""

    name: str  # what figures and tables call the run
    run: str  # its place
    data: str  # the annotations, or the picture, that it was measured on

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: fields of a record in it beside the others, and nothing that is for the figure alone."""
        values: dict[str, Any] = {}
        for name, value in _json_fields(self).items():
            values |= value if is_dataclass(getattr(self, name)) else {name: value}
        return values


@dataclass(frozen=True)
class Result(ABC):
    """Several runs, measured in the same way; the fields of subclasses are what they were measured with."""

    name: ClassVar[str]  # of the measurement, as its files have it
    runs: tuple[RunResult, ...]

    @abstractmethod
    def table(self) -> Table:
        """The runs below each other, for a rich console."""

    def settings(self) -> dict[str, Any]:
        """What the runs were measured with, as JSON holds it."""
        return _json_fields(self, "runs")

    def to_dict(self) -> dict[str, Any]:
        """Settings and values, as JSON holds them."""
        return {"measurement": self.name, "settings": self.settings(), "runs": [run.to_dict() for run in self.runs]}


def as_json(value: Any) -> Any:
    """`value` as JSON would give it back: tuples as lists, keys as text, records as objects of their fields, and an
    evaluation as its statistics."""
    if isinstance(value, EvalResult):
        return dict(value.stats)
    if is_dataclass(value):
        return _json_fields(value)
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, tuple | list) else value


def _json_fields(record: Any, *without: str) -> dict[str, Any]:
    names = [field.name for field in fields(record) if field.name not in (*without, *FIGURE_ONLY)]
    return {name: as_json(getattr(record, name)) for name in names}


def mean_or_none(values: Tensor) -> float | None:
    """The mean in float64 of the `values (n,)` that are not NaN; None where there are none."""
    return None if values.isnan().all() else float(values.double().nanmean())


def run_table(
    title: str, caption: str, *columns: str, left: Collection[str] = (), wrapped: Collection[str] = ()
) -> Table:
    """A table whose first column names the run, narrow enough for 80 letters; see `add_run`.

    The other `columns` are for numbers: to the right, unless they are in `left`, and on one line, unless in `wrapped`.
    """
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    table.add_column("run", overflow="fold")
    for column in columns:
        wraps = column in wrapped
        justify: JustifyMethod = "left" if column in left else "right"
        table.add_column(column, justify=justify, no_wrap=not wraps, overflow="fold" if wraps else "ellipsis")
    return table


def add_run(table: Table, name: str, *cells: str, end_section: bool = False) -> None:
    """A row for a run, its cells as they are: also a name, or a class, such as "[bold]"."""
    table.add_row(*(Text(cell) for cell in (name, *cells)), end_section=end_section)
