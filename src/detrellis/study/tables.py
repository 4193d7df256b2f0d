"""The report as text tables: one for AP, one for what it costs.
Cells are shared with the HTML page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from detrellis.engine.console import number
from detrellis.engine.evaluate import NMS
from detrellis.study.report import RowResult, StudyReport
from detrellis.study.results import Estimate

NONE = "-"
Columns = dict[str, Callable[[RowResult], str]]  # what stands in a row's cell below each heading


class ReportTable(NamedTuple):
    """A table of the report as text cells; the first column is the row's name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def report_tables(report: StudyReport) -> list[ReportTable]:
    """The tables of a report."""
    base = report.plan.baseline or "its baseline"
    seeds = "" if len(report.plan.seeds) == 1 else ", mean ± standard deviation over the seeds"
    ap: Columns = {
        "AP": lambda row: spread(row.final),
        **_gains(f"gain over {base}", report, lambda row: row.gain),
        "AP50": lambda row: f"{row.ap50.mean:.1f}",
        "AP75": lambda row: f"{row.ap75.mean:.1f}",
        "best AP": lambda row: f"{row.best.mean:.1f}",
    }
    if report.plan.baseline is None and report.others:
        ap["baseline"] = lambda row: row.planned.against or NONE
    if any(row.planned.published is not None for row in report.rows):
        ap["published AP"] = lambda row: number(row.planned.published, ".1f")
        ap["published gain"] = lambda row: number(row.published_gain, "+.1f")
    if any(len(row.runs) != len(report.plan.seeds) for row in report.rows):
        ap["seeds"] = lambda row: str(len(row.runs))
    cost: Columns = {
        "step": lambda row: seconds(row.step_seconds),
        f"times {base}": lambda row: number(row.cost, ".2f"),
        "memory": lambda row: NONE if row.memory is None else f"{row.memory / 2**30:.1f} GiB",
        f"epochs to {base}'s AP": _epochs,
    }
    if report.plan.pace is None:
        cost["AP in the same time"] = lambda row: (
            NONE if row.timely is None else f"{row.timely[1]:.1f}"
        )
    else:
        cost = {"epochs": lambda row: str(row.planned.recipe.schedule.epochs)} | cost
    tables = [
        _sheet(f"AP after the last epoch{seeds}", ap, report),
        _sheet("Cost of training", cost, report),
    ]
    if any(row.after_nms is not None for row in report.rows):
        after_nms: Columns = {
            "AP": lambda row: NONE if row.after_nms is None else spread(row.after_nms[0]),
            **_gains(f"gain over {base}", report, lambda row: row.gain_after_nms),
            "AP50": lambda row: NONE if row.after_nms is None else f"{row.after_nms[1].mean:.1f}",
            "AP75": lambda row: NONE if row.after_nms is None else f"{row.after_nms[2].mean:.1f}",
            "NMS adds": lambda row: number(row.duplicates, "+.1f"),
        }
        tables.insert(
            1, _sheet(f"The same without duplicates: after NMS at IoU {NMS}", after_nms, report)
        )
    return tables


def _gains(name: str, report: StudyReport, of: Callable[[RowResult], Estimate | None]) -> Columns:
    """The column of a gain, and that of its interval with other images where the rows know it."""
    columns: Columns = {name: lambda row: gain(of(row))}
    if any((line := of(row)) is not None and line.with_images is not None for row in report.rows):
        columns["other images, too"] = lambda row: with_images(of(row))
    return columns


def _sheet(title: str, columns: Columns, report: StudyReport) -> ReportTable:
    rows = [(row.name, *(cell(row) for cell in columns.values())) for row in report.rows]
    return ReportTable(title, ("row", *columns), tuple(rows))


def rich_table(sheet: ReportTable) -> Table:
    """The table for a console of 80 columns."""
    table = Table(title=sheet.title, title_justify="left", box=SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    table.add_column(sheet.columns[0], overflow="fold")
    for column in sheet.columns[1:]:
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, *cells in sheet.rows:
        table.add_row(Text(name), *cells)  # Text: a row may be called "[bold]"
    return table


def spread(of: Estimate) -> str:
    """A mean with its standard deviation, such as `44.0 ± 0.3`."""
    return f"{of.mean:.1f}" + ("" if of.spread is None else f" ± {of.spread:.1f}")


def gain(of: Estimate | None) -> str:
    """A mean with its interval, such as `+3.1 [+2.2, +4.0]`."""
    if of is None:
        return NONE
    if of.interval is None:
        return f"{of.mean:+.1f}"
    return f"{of.mean:+.1f} [{of.mean - of.interval:+.1f}, {of.mean + of.interval:+.1f}]"


def with_images(of: Estimate | None) -> str:
    """The interval that other validation images widen, such as `[+1.8, +4.4]`."""
    if of is None or of.with_images is None:
        return NONE
    return f"[{of.mean - of.with_images:+.1f}, {of.mean + of.with_images:+.1f}]"


def seconds(value: float | None) -> str:
    """A time in seconds, such as `0.35 s`."""
    return NONE if value is None else f"{value:.3g} s"


def _epochs(row: RowResult) -> str:
    """The first epoch that is as good as the baseline's last; "> 12" where none of 12 is."""
    if row.cost is None and row.gain is None:
        return NONE
    return (
        f"> {row.curve[-1][0]}" if row.epochs_to_baseline is None else str(row.epochs_to_baseline)
    )
