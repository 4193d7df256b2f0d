"""The report's figures: AP along training, and what each row gains and costs."""

from __future__ import annotations

from typing import Any

from detrellis.analysis.figures import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    Axes,
    Figure,
    as_written,
    canvas,
    colours,
    shortened,
    tidy,
    whole_numbers,
)
from detrellis.study.report import RowResult, StudyReport
from detrellis.study.results import TrialResult


def figures(report: StudyReport) -> dict[str, tuple[Figure, str]]:
    """The figures of a report by name, each with a sentence that says what it shows."""
    drawn: dict[str, tuple[Figure, str]] = {}
    if report.rows:
        many = any(len(row.runs) > 1 for row in report.rows)
        shade = "; the shade is from the lowest to the highest seed" if many else ""
        drawn["curves"] = (
            _curves(report),
            f"AP after each epoch, and along minutes of training without evaluations{shade}.",
        )
    if report.others:
        whiskers = (
            "; whiskers are 95 % intervals" if any(_interval(row) for row in report.others) else ""
        )
        caption = (
            f"What each row gains over {_base(report)}, and its step time in multiples of that "
            f"one's{whiskers}."
        )
        drawn["gains"] = _gains(report), caption
    return drawn


def _curves(report: StudyReport) -> Figure:
    legend_rows = -(-len(report.rows) // 4)
    figure = canvas(9.2, 3.6 + 0.22 * legend_rows, "")
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for row, colour in zip(report.rows, colours(len(report.rows)), strict=True):
        style = {"color": colour, "linestyle": "--" if row.name in report.plan.baselines else "-"}
        _curve(by_epoch, row, 1.0, style)
        if row.epoch_seconds is not None:
            _curve(by_time, row, row.epoch_seconds / 60, style)
    for axes in (by_epoch, by_time):
        tidy(axes)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    by_epoch.set(xlabel="epoch", ylabel="AP")
    whole_numbers(by_epoch)
    by_time.set(xlabel="minutes of training")
    for budget in {row.budget for row in report.rows if row.budget is not None}:
        by_time.axvline(budget / 60, color=FAINT, linewidth=0.8, linestyle=":")
    handles = by_epoch.get_legend_handles_labels()
    as_written(
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    )
    return figure


def _curve(axes: Axes, row: RowResult, unit: float, style: dict[str, Any]) -> None:
    epochs = [epoch for epoch, _ in row.curve]
    x = [epoch * unit for epoch in epochs]
    axes.plot(
        x,
        [ap for _, ap in row.curve],
        label=shortened(row.name),
        linewidth=1.6,
        marker=".",
        **style,
    )
    if len(row.runs) > 1:
        every = [_at(run, epochs) for run in row.runs]
        low, high = ([pick(values) for values in zip(*every, strict=True)] for pick in (min, max))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _at(run: TrialResult, epochs: list[int]) -> list[float]:
    ap = dict(zip(run.epochs, run.ap, strict=True))
    return [ap[epoch] for epoch in epochs]


def _gains(report: StudyReport) -> Figure:
    """Bars side by side, one bar for each row, the first row on top."""
    rows = report.others
    figure = canvas(9.2, 1.3 + 0.38 * len(rows), "")
    left, right = figure.subplots(1, 2, sharey=True)
    places = list(range(len(rows)))[::-1]
    gains = [row.gain.mean if row.gain else 0.0 for row in rows]
    left.barh(places, gains, color=[BLUE if gain >= 0 else ORANGE for gain in gains], height=0.6)
    for place, row in zip(places, rows, strict=True):
        if (interval := _interval(row)) and row.gain:
            left.errorbar(row.gain.mean, place, xerr=interval, color=INK, capsize=3, linewidth=1)
    left.axvline(0, color=INK, linewidth=0.8)
    left.set(xlabel=f"AP over {shortened(_base(report))}")
    left.set_yticks(places, [shortened(row.name) for row in rows], parse_math=False)
    right.barh(places, [row.cost or 0.0 for row in rows], color=FAINT, height=0.6)
    right.axvline(1, color=INK, linewidth=0.8)
    right.set(xlabel="step time, times the baseline's")
    for axes in (left, right):
        tidy(axes)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.6)
    return figure


def _base(report: StudyReport) -> str:
    return report.plan.baseline or "its baseline"


def _interval(row: RowResult) -> float | None:
    return None if row.gain is None else row.gain.interval
