"""What measurements take and return:
the runs that are compared, and the values of each as records, table and JSON.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text
from torch import Tensor

from detrellis.arguments import BatchSize, Split, Workers, checked
from detrellis.data.findings import SkipBad
from detrellis.data.layout import DataSource
from detrellis.distributed import process_group
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit, open_split

OneRun = TypeVar("OneRun")
# Fields that are drawn, and not written to the JSON
FIGURE_ONLY = ("example", "examples", "picture")


class ComparedRuns:
    """One run or several, to be measured in the same way."""

    @checked
    def __init__(
        self,
        places: str | Path | Sequence[str | Path],
        *,
        names: Sequence[str] | None = None,
        device: str | None = None,
        progress: bool = False,
        data: str | Path | DataSource | None = None,
        val: str | Path | None = None,
        val_images: str | Path | None = None,
        split: Split = "val",
        batch_size: BatchSize = 4,
        skip_bad: SkipBad = False,
        workers: Workers = 2,
    ) -> None:
        """`places` are folders of runs, weights files, or checkpoints of others.

        `names` is what figures and tables call the runs (default: as much of the end of each path
        as tells them apart); `progress` shows a bar on a terminal. Each run is measured on `split`
        of its own data set, or all on that of `data`, or on the annotations `val`, with images in
        `val_images`; `skip_bad` drops bad records instead of refusing the data set. `batch_size` is
        in images, `workers` are the processes that load them.

        Raises `UserError` where there is no run, or where the names are not different and one a
        run.
        """
        self.places = [places] if isinstance(places, str | Path) else list(places)
        if not self.places:
            raise UserError("no run to measure", "Name at least one.")
        self.names = run_names(self.places, names)
        self.device, self.progress = device, progress
        self.split = split if val is None else "val"  # what a report calls the images
        self.options = EvalOptions(data, val, val_images, split, batch_size, skip_bad, workers)

    def measure(
        self,
        measure: Callable[[OpenedSplit, str, bool], OneRun],
        check: Callable[[str | Path], object] = Path,
    ) -> tuple[OneRun, ...]:
        """What `measure(opened, name, show)` returns for each run;
        `show` says whether to draw progress.

        `check` is called with the place of every run before minutes are spent on the first. Raises
        `UserError` where a run or its images cannot be read.
        """
        for place in self.places:
            check(place)
        results = []
        with process_group(self.device) as process:
            show = self.progress and process.is_main_process
            for place, name in zip(self.places, self.names, strict=True):
                with open_split(place, process, self.options) as opened:
                    results.append(measure(opened, name, show))
        return tuple(results)


def run_names(runs: Sequence[str | Path], names: Sequence[str] | None = None) -> list[str]:
    """What figures and tables call the runs:
    `names`, or as much of the end of each path as tells them apart.

    The same run twice gets a number. Raises `UserError` unless `names` are different and one a run.
    """
    if names is not None:
        if len(names) != len(runs) or len(set(names)) != len(names) or not all(names):
            raise UserError(
                f"names {', '.join(names)}", f"Give one a run ({len(runs)}), all different."
            )
        return list(names)
    parts = [Path(os.path.abspath(run)).parts for run in runs]
    different = len(set(parts))
    depth = 1
    while len({p[-depth:] for p in parts}) < different:
        depth += 1
    ends = ["/".join(p[-depth:]) for p in parts]
    return [
        f"{name}-{ends[: i + 1].count(name)}" if name in ends[:i] else name
        for i, name in enumerate(ends)
    ]


@dataclass(frozen=True)
class RunResult:
    """What every measurement says of one run; subclasses add their values."""

    name: str  # what figures and tables call the run
    run: str  # its place
    data: str  # the annotations, or the picture, that it was measured on

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: fields of a record in it beside the others,
        and nothing that is for the figure alone.
        """
        values: dict[str, Any] = {}
        for name, value in _json_fields(self).items():
            values |= value if is_dataclass(getattr(self, name)) else {name: value}
        return values


@dataclass(frozen=True)
class Result(ABC):
    """Several runs, measured in the same way;
    the fields of subclasses are what they were measured with.
    """

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
        return {
            "measurement": self.name,
            "settings": self.settings(),
            "runs": [run.to_dict() for run in self.runs],
        }


def as_json(value: Any) -> Any:
    """`value` as JSON would give it back: tuples as lists, keys as text, records as objects of
    their fields, and an evaluation as its statistics."""
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
    title: str,
    caption: str,
    *columns: str,
    left: Collection[str] = (),
    wrapped: Collection[str] = (),
) -> Table:
    """A table whose first column names the run, narrow enough for 80 letters; see `add_run`.

    The other `columns` are for numbers: to the right, unless they are in `left`, and on one line,
    unless in `wrapped`.
    """
    table = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD
    )
    table.padding = (0, 1, 0, 0)
    table.add_column("run", overflow="fold")
    for column in columns:
        wraps = column in wrapped
        justify: JustifyMethod = "left" if column in left else "right"
        table.add_column(
            column, justify=justify, no_wrap=not wraps, overflow="fold" if wraps else "ellipsis"
        )
    return table


def add_run(table: Table, name: str, *cells: str, end_section: bool = False) -> None:
    """A row for a run, its cells as they are: also a name, or a class, such as "[bold]"."""
    table.add_row(*(Text(cell) for cell in (name, *cells)), end_section=end_section)
