"""The report's figures: AP along training, and what each row gains and costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detrellis.analysis.figures import BLUE, FAINT, INK, ORANGE, canvas, colours, shortened, tidy
from detrellis.study.numbers import Measured
from detrellis.study.report import Line, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figures(found: Report) -> dict[str, tuple[Figure, str]]:
    """By name: a figure, and what it shows in a sentence."""
    drawn: dict[str, tuple[Figure, str]] = {}
    if found.lines:
        many = any(len(line.runs) > 1 for line in found.lines)
        shade = "; the shade is from the lowest to the highest seed" if many else ""
        drawn["curves"] = (
            _curves(found),
            f"AP after each epoch, and along minutes of training without evaluations{shade}.",
        )
    if found.others:
        whiskers = "; whiskers are 95 % intervals" if any(_interval(line) for line in found.others) else ""
        told = f"What each row gains over {_base(found)}, and its step time in multiples of that one's{whiskers}."
        drawn["gains"] = _gains(found), told
    return drawn


def _curves(found: Report) -> Figure:
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(found.lines) // 4)
    figure = canvas(9.2, 3.6 + 0.22 * rows, "")
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for line, colour in zip(found.lines, colours(len(found.lines)), strict=True):
        style = {"color": colour, "linestyle": "--" if line.name in found.plan.baselines else "-"}
        _curve(by_epoch, line, 1.0, style)
        if line.epoch_seconds is not None:
            _curve(by_time, line, line.epoch_seconds / 60, style)
    for axes in (by_epoch, by_time):
        tidy(axes)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    by_epoch.set(xlabel="epoch", ylabel="AP")
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_time.set(xlabel="minutes of training")
    for budget in {line.budget for line in found.lines if line.budget is not None}:
        by_time.axvline(budget / 60, color=FAINT, linewidth=0.8, linestyle=":")
    legend = figure.legend(
        *by_epoch.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _curve(axes: Axes, line: Line, unit: float, style: dict[str, Any]) -> None:
    epochs = [epoch for epoch, _ in line.curve]
    x = [epoch * unit for epoch in epochs]
    axes.plot(x, [ap for _, ap in line.curve], label=shortened(line.name), linewidth=1.6, marker=".", **style)
    if len(line.runs) > 1:
        every = [_at(run, epochs) for run in line.runs]
        low, high = ([pick(values) for values in zip(*every, strict=True)] for pick in (min, max))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _at(run: Measured, epochs: list[int]) -> list[float]:
    ap = dict(zip(run.epochs, run.ap, strict=True))
    return [ap[epoch] for epoch in epochs]


def _gains(found: Report) -> Figure:
    """Bars side by side, a row a line, the first on top."""
    lines = found.others
    figure = canvas(9.2, 1.3 + 0.38 * len(lines), "")
    left, right = figure.subplots(1, 2, sharey=True)
    places = list(range(len(lines)))[::-1]
    gains = [line.gain.mean if line.gain else 0.0 for line in lines]
    left.barh(places, gains, color=[BLUE if gain >= 0 else ORANGE for gain in gains], height=0.6)
    for place, line in zip(places, lines, strict=True):
        if (interval := _interval(line)) and line.gain:
            left.errorbar(line.gain.mean, place, xerr=interval, color=INK, capsize=3, linewidth=1)
    left.axvline(0, color=INK, linewidth=0.8)
    left.set(xlabel=f"AP over {shortened(_base(found))}")
    left.set_yticks(places, [shortened(line.name) for line in lines], parse_math=False)
    right.barh(places, [line.cost or 0.0 for line in lines], color=FAINT, height=0.6)
    right.axvline(1, color=INK, linewidth=0.8)
    right.set(xlabel="step time, times the baseline's")
    for axes in (left, right):
        tidy(axes)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.6)
    return figure


def _base(found: Report) -> str:
    return found.plan.baseline or "its baseline"


def _interval(line: Line) -> float | None:
    return None if line.gain is None else line.gain.interval
