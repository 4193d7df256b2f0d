"""The report as text tables: one for AP, one for what it costs. Cells are shared with the HTML page."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from detrellis.engine.console import number
from detrellis.engine.evaluate import NMS
from detrellis.study.numbers import Estimate
from detrellis.study.report import Line, Report

NONE = "-"


class Sheet(NamedTuple):
    """Cells of a table; the first column is the row's name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sheets(found: Report) -> list[Sheet]:
    """The tables of a report."""
    base = found.plan.baseline or "its baseline"
    seeds = "" if len(found.plan.seeds) == 1 else ", mean ± standard deviation over the seeds"
    ap: dict[str, Callable[[Line], str]] = {
        "AP": lambda line: spread(line.final),
        f"gain over {base}": lambda line: gain(line.gain),
        "AP50": lambda line: f"{line.ap50.mean:.1f}",
        "AP75": lambda line: f"{line.ap75.mean:.1f}",
        "best AP": lambda line: f"{line.best.mean:.1f}",
    }
    if found.plan.baseline is None and found.others:
        ap["baseline"] = lambda line: line.row.against or NONE
    if any(line.row.published is not None for line in found.lines):
        ap["published AP"] = lambda line: number(line.row.published, ".1f")
        ap["published gain"] = lambda line: number(line.published_gain, "+.1f")
    if any(len(line.runs) != len(found.plan.seeds) for line in found.lines):
        ap["seeds"] = lambda line: str(len(line.runs))
    cost: dict[str, Callable[[Line], str]] = {
        "step": lambda line: seconds(line.step_seconds),
        f"times {base}": lambda line: number(line.cost, ".2f"),
        "memory": lambda line: NONE if line.memory is None else f"{line.memory / 2**30:.1f} GiB",
        f"epochs to {base}'s AP": _epochs,
    }
    if found.plan.pace is None:
        cost["AP in the same time"] = lambda line: NONE if line.timely is None else f"{line.timely[1]:.1f}"
    else:
        cost = {"epochs": lambda line: str(line.row.recipe.schedule.epochs)} | cost
    told = [_sheet(f"AP after the last epoch{seeds}", ap, found), _sheet("Cost of training", cost, found)]
    if any(line.after_nms is not None for line in found.lines):
        apart: dict[str, Callable[[Line], str]] = {
            "AP": lambda line: NONE if line.after_nms is None else spread(line.after_nms[0]),
            f"gain over {base}": lambda line: gain(line.gain_after_nms),
            "AP50": lambda line: NONE if line.after_nms is None else f"{line.after_nms[1].mean:.1f}",
            "AP75": lambda line: NONE if line.after_nms is None else f"{line.after_nms[2].mean:.1f}",
            "NMS adds": lambda line: number(line.duplicates, "+.1f"),
        }
        told.insert(1, _sheet(f"The same without duplicates: after NMS at IoU {NMS}", apart, found))
    return told


def _sheet(title: str, columns: dict[str, Callable[[Line], str]], found: Report) -> Sheet:
    rows = [(line.name, *(cell(line) for cell in columns.values())) for line in found.lines]
    return Sheet(title, ("row", *columns), tuple(rows))


def rich_table(sheet: Sheet) -> Table:
    """For a console of 80 letters."""
    table = Table(title=sheet.title, title_justify="left", box=SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    table.add_column(sheet.columns[0], overflow="fold")
    for column in sheet.columns[1:]:
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, *cells in sheet.rows:
        table.add_row(Text(name), *cells)  # Text: a row may be called "[bold]"
    return table


def spread(of: Estimate) -> str:
    """`44.0 ± 0.3`."""
    return f"{of.mean:.1f}" + ("" if of.spread is None else f" ± {of.spread:.1f}")


def gain(of: Estimate | None) -> str:
    """`+3.1 [+2.2, +4.0]`: the mean and its interval."""
    if of is None:
        return NONE
    if of.interval is None:
        return f"{of.mean:+.1f}"
    return f"{of.mean:+.1f} [{of.mean - of.interval:+.1f}, {of.mean + of.interval:+.1f}]"


def seconds(value: float | None) -> str:
    """`0.35 s`."""
    return NONE if value is None else f"{value:.3g} s"


def _epochs(line: Line) -> str:
    """The first that is as good as the baseline's last; "> 12": none of 12."""
    if line.cost is None and line.gain is None:
        return NONE
    return f"> {line.curve[-1][0]}" if line.epochs_to_baseline is None else str(line.epochs_to_baseline)
