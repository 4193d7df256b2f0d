"""How work looks on the console; training:
a bar on a terminal, a line now and then elsewhere, a row every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import track as rich_track

from detrellis.terminal import Terminal

Item = TypeVar("Item")

LINE_SECONDS = 10.0  # without a terminal, at most one progress line in this time
HEADER_ROWS = 20  # the header is printed again after this many epochs


def number(value: float | None, form: str = ".3f") -> str:
    """A number as tables show it, and a dash for None."""
    return "-" if value is None else f"{value:{form}}"


def track(items: Iterable[Item], what: str, total: int, show: bool) -> Iterable[Item]:
    """`items` with a progress bar on stderr, where there is a terminal to show it."""
    console = Terminal(stderr=True)
    return (
        rich_track(items, what, total, console=console, transient=True)
        if show and console.is_terminal
        else items
    )


class TrainingView:
    """Shows one run; records are those of `RunLog`.
    `step`: steps that were done before this process began.
    """

    def __init__(
        self, console: Console, clock: Callable[[], float], epochs: int, steps: int, step: int = 0
    ) -> None:
        self._console, self._clock, self._epochs, self._steps = console, clock, epochs, steps
        self._epoch, self._rows, self._info = 0, 0, ""
        self._columns: dict[str, int] = {}
        self._last_line = -math.inf
        self._eta = _Eta(clock, epochs * steps - step, steps)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def line(self, text: str, style: str = "") -> None:
        """Prints a line of its own; never wrapped, so that a log file can be searched."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def start_epoch(self, epoch: int) -> None:
        """Shows a fresh bar for the epoch."""
        self._epoch = epoch
        self._eta.start_epoch()
        if not self._console.is_terminal:
            return
        bar = self._progress()
        if self._task is not None:
            bar.remove_task(self._task)
        self._task = bar.add_task(
            f"epoch {epoch}/{self._epochs}", total=self._steps, info=self._info
        )

    def advance(self, step: int) -> None:
        """Shows that step `step` of the run is done."""
        self._eta.step()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._in_epoch(step))

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows the newest step record."""
        parts = [
            f"loss {_number(record['loss'])}",
            f"IoU {_number(matched_iou(record['metrics']), '.2f')}",
        ]
        parts.append(f"{_number(record['images_per_second'], '.1f')} img/s")
        left = self._eta.left()
        parts.append(f"eta {duration(left) if left is not None else '-'}")
        self._info = "  ".join(parts)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, info=self._info)
            return
        now = self._clock()
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            done = self._in_epoch(record["step"])
            self.line(
                f"epoch {self._epoch}/{self._epochs}  step {done}/{self._steps}  {self._info}"
            )

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        """Prints the epoch's row, and below it where the time went."""
        cells = epoch_cells(record, self._epochs)
        if not self._columns:  # the first epoch's columns stay
            self._columns = {name: max(len(name), len(text), 6) for name, text in cells.items()}
        if self._rows % HEADER_ROWS == 0:
            self.line(
                "  ".join(name.rjust(width) for name, width in self._columns.items()), style="bold"
            )
        self._rows += 1
        self.line(
            "  ".join(cells.get(name, "-").rjust(width) for name, width in self._columns.items())
        )
        padded = record["metrics"].get("data/padding", 0.0)
        self.line(
            time_line(record["seconds"]) + (f"  padding {padded:.0%}" if padded >= 0.005 else ""),
            style="dim",
        )

    def track(self, items: Iterable[Item], name: str, total: int | None) -> Iterator[Item]:
        """Yields `items` under a bar of their own; without a terminal, silently."""
        if not self._console.is_terminal:
            yield from items
            return
        bar = self._progress()
        task = bar.add_task(name, total=total, info="")
        try:
            for item in items:
                yield item
                bar.advance(task)
        finally:
            bar.remove_task(task)
            bar.refresh()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _progress(self) -> Progress:
        if self._bar is None:
            name, info = (
                TextColumn(f"{{task.{field}}}", markup=False)
                for field in ("description", "fields[info]")
            )
            columns = (name, BarColumn(24), MofNCompleteColumn(), info)
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        return self._bar

    def _in_epoch(self, step: int) -> int:
        return step - (self._epoch - 1) * self._steps


class _Eta:
    """Seconds left: the steps left at the mean pace so far, and for every epoch left what passes
    between two epochs (evaluation, checkpoints). The process's first step is not typical
    (compiling, warming up) and not counted."""

    def __init__(self, clock: Callable[[], float], left: int, steps_per_epoch: int) -> None:
        self._clock, self._left, self._steps_per_epoch = clock, left, steps_per_epoch
        self._done = self._gaps = 0  # by this process
        self._stepping = self._between = 0.0
        self._last: float | None = None

    def start_epoch(self) -> None:
        now = self._clock()
        if self._last is not None:
            self._between += now - self._last
            self._gaps += 1
        self._last = now

    def step(self) -> None:
        now = self._clock()
        if self._last is not None and self._done:
            self._stepping += now - self._last
        self._last, self._done, self._left = now, self._done + 1, self._left - 1

    def left(self) -> float | None:
        if self._done < 2:
            return None
        left = max(0, self._left)
        gaps = math.ceil(left / self._steps_per_epoch) * self._between / max(1, self._gaps)
        return left * self._stepping / (self._done - 1) + gaps


def matched_iou(metrics: Mapping[str, float]) -> float | None:
    """The matched IoU of the main queries, those that inference uses."""
    return metrics.get("main/iou", metrics.get("iou"))


def main_terms(losses: Mapping[str, float]) -> dict[str, float]:
    """Those of losses named "block/term/layer" that the last decoder layer has for the main
    queries, by term.
    """
    last: dict[str, tuple[int, float]] = {}
    for name, value in losses.items():
        block, _, rest = name.partition("/")
        term, _, layer = rest.partition("/")
        if block == "main" and layer.isdecimal():
            last[term] = max(
                last.get(term, (-1, 0.0)), (int(layer), value), key=lambda pair: pair[0]
            )
    return {term: value for term, (_, value) in last.items()}


def epoch_cells(record: Mapping[str, Any], epochs: int) -> dict[str, str]:
    """The cells of an epoch's row, by column."""
    stats = record["eval"] or {}
    cells = {"epoch": f"{record['epoch']}/{epochs}", "loss": _number(record["loss"])}
    cells |= {term: _number(value) for term, value in main_terms(record["losses"]).items()}
    cells |= {"IoU": _number(matched_iou(record["metrics"]), ".3f")}
    cells |= {name: _number(stats.get(name), ".3f") for name in ("AP", "AP50")}
    return cells | {
        "lr": _number(record["lr"], ".1e"),
        "img/s": _number(record["images_per_second"], ".1f"),
    }


def time_line(seconds: Mapping[str, float]) -> str:
    """The time of an epoch and of its parts, such as `time 2:04  data 3.7s 3%  forward 43s 35%`;
    and what is left of it where that is 1 % or more."""
    parts = {name: value for name, value in seconds.items() if name != "total"}
    total = seconds["total"]
    rest = total - sum(parts.values())
    if parts and rest >= 0.01 * total:
        parts["other"] = rest
    texts = [f"  time {duration(total)}"]
    for name, value in parts.items():
        if total > 0:
            texts.append(f"{name} {value:.{1 if value < 10 else 0}f}s {value / total:.0%}")
    return "  ".join(texts)


def duration(seconds: float) -> str:
    """A duration as hours, minutes and seconds, such as `0:02:04`."""
    return str(timedelta(seconds=round(seconds)))


def _number(value: float | None, form: str = "#.4g") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{form}}".rstrip(".")
