"""The figure of the groups of queries: where they are, how alike their histograms are, how their
distances were in training, and what each group detects (Group DETR, Fig. 3 and 4).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from detrellis.analysis.figures import (
    BLUE,
    FAINT,
    ORANGE,
    Axes,
    Figure,
    canvas,
    colours,
    heading,
    run_rows,
    tidy,
    value_bars,
    whole_numbers,
)
from detrellis.analysis.groups import GroupsResult, RunGroups
from detrellis.engine.console import number

SIZE = (13.0, 5.8)  # inches of one run


def draw(result: GroupsResult) -> Figure:
    """The runs below each other: positions and four panels. Raises `UserError` where matplotlib is
    missing.
    """
    width, height = SIZE
    figure = canvas(width, height * len(result.runs) + 0.5, "Groups of queries")
    sizes = [f"{run.groups} groups of {run.queries} queries" for run in result.runs]
    for run, part in zip(result.runs, run_rows(figure, result.runs, sizes), strict=True):
        _draw_run(part, run, result.grid)
    return figure


def _draw_run(part: Any, run: RunGroups, grid: int) -> None:
    panels = part.subplot_mosaic(
        [["where", "histograms", "log"], ["where", "is", "ap"]], width_ratios=[1.45, 1, 1]
    )
    for axes in panels.values():
        tidy(axes)
    palette = colours(run.groups)
    if run.positions is None or run.shares is None:
        for name in ("where", "histograms", "log"):
            _say(panels[name], "The queries have no place.")
    else:
        _positions(panels["where"], run, palette)
        _histograms(panels["histograms"], run, grid, palette)
        _log(panels["log"], run)
    part.legend(
        handles=[_marker(colour, str(k + 1)) for k, colour in enumerate(palette)],
        title="group", ncols=run.groups, fontsize=8, title_fontsize=8, frameon=False,
        loc="outside lower left", columnspacing=1, handletextpad=0.2,
    )  # fmt: skip
    _instability(panels["is"], run)
    _scores(panels["ap"], run, palette)
    for axes in panels.values():
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)


def _say(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(
        0.5, 0.5, text, ha="center", va="center", fontsize=9, color=FAINT, transform=axes.transAxes
    )


def _marker(colour: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker="o", markersize=5, linestyle="", label=label)


def _positions(axes: Axes, run: RunGroups, palette: list[str]) -> None:
    """Fig. 3: in the order of the queries, not of the groups, so that no group lies above all
    others.
    """
    assert run.positions is not None
    points = np.array(run.positions)  # (K, N, 2)
    x, y = points.transpose(1, 0, 2).reshape(-1, 2).T
    axes.scatter(
        x, y, c=palette * run.queries, s=max(6, min(24, 6000 / len(x))), alpha=0.75, linewidths=0
    )
    where = (
        "where the queries are" if run.fixed else "where the queries are in one image (proposals)"
    )
    heading(axes, f"{where}; PD {number(run.pd)}, MD {number(run.md)}")
    axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", anchor="W")
    axes.set(xlabel="x, share of the width", ylabel="y, share of the height")


def _histograms(axes: Axes, run: RunGroups, grid: int, palette: list[str]) -> None:
    """One small map a group, side by side; the gaps between them are NaN."""
    assert run.shares is not None
    columns = min(run.groups, math.ceil(math.sqrt(1.6 * run.groups)))  # a panel is wider than high
    rows = math.ceil(run.groups / columns)
    side = grid + 1
    tiles = np.full((rows * side - 1, columns * side - 1), np.nan)
    for k, cells in enumerate(run.shares):
        top, left = k // columns * side, k % columns * side
        tiles[top : top + grid, left : left + grid] = 100 * np.array(cells).reshape(grid, grid)
        axes.text(
            left - 0.3,
            top - 0.3,
            str(k + 1),
            color=palette[k],
            fontsize=9,
            fontweight="bold",
            va="top",
        )
    axes.imshow(tiles, cmap="Greys", vmin=0)
    axes.set_axis_off()
    axes.set_anchor("W")
    heading(axes, f"histograms: distance {number(run.distance)} (random {number(run.random)})")
    each = "" if run.fixed else "mean of all images; "
    note = f"{each}black: {np.nanmax(tiles):.1f}% of a group's queries"
    axes.text(0, -0.04, note, fontsize=8, color=FAINT, va="top", transform=axes.transAxes)


def _log(axes: Axes, run: RunGroups) -> None:
    """Fig. 4."""
    if not run.log:
        _say(axes, "PD and MD in training: not logged.\nTrain with -o schemes.group.distances=true")
        return
    epochs = [x.epoch for x in run.log]
    for name, values, colour in (
        ("MD", [x.md for x in run.log], ORANGE),
        ("PD", [x.pd for x in run.log], BLUE),
    ):
        heights = [math.nan if v is None else v for v in values]
        axes.plot(
            epochs, heights, color=colour, linewidth=1.6, marker="o", markersize=3, label=name
        )
    heading(axes, "PD and MD in training")
    axes.set(xlabel="epoch", ylabel="distance")
    axes.set_ylim(bottom=0)
    whole_numbers(axes)
    axes.legend(fontsize=8, frameon=False)


def _instability(axes: Axes, run: RunGroups) -> None:
    if not run.instability:
        _say(axes, "IS: the decoder has one layer.")
        return
    names = [f"{i}→{i + 1}" for i in range(1, len(run.instability) + 1)]
    axes.plot(names, run.instability, color=BLUE, linewidth=1.6, marker="o", markersize=4)
    for i, value in enumerate(run.instability):
        axes.annotate(f"{value:.1f}", (i, value), (4, 4), textcoords="offset points", fontsize=8)
    heading(
        axes, f"instability IS of group 1; {run.boxes / max(run.images, 1):.1f} boxes in an image"
    )
    axes.set(xlabel="decoder layers", ylabel="queries matched anew")
    axes.margins(x=0.15, y=0.25)
    axes.set_ylim(bottom=0)


def _scores(axes: Axes, run: RunGroups, palette: list[str]) -> None:
    values = [s.ap for s in run.scores]
    names = [str(k + 1) for k in range(run.groups)]
    value_bars(axes, names, values, 0.7, fontsize=8 if run.groups <= 8 else 6, color=palette)
    heading(axes, "AP of each group alone")
    axes.set(xlabel="group", ylabel="AP")
    axes.margins(y=0.15)
