"""The figure of `one_to_many.py`: AP over the number of training queries."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from detrellis.analysis.figures import BLUE, COLOURS, ORANGE, canvas, tidy
from detrellis.analysis.one_to_many import OneToManyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {"group-wise": ("o", BLUE), "one-to-one": ("s", COLOURS[2]), "one-to-many": ("v", ORANGE)}
AFTER_NMS = ("^", COLOURS[3])


def draw(result: OneToManyResult) -> Figure:
    """Fig. 1: a point a run, and a curve through the mean of runs alike. Raises `UserError` without matplotlib."""
    figure = canvas(6.4, 4.6, "AP by assignment")
    axes = figure.subplots()
    tidy(axes)
    for name, points in result.curves().items():
        marker, colour = LOOKS.get(name, AFTER_NMS)
        counts = sorted({queries for queries, _ in points})
        means = [fmean(ap for queries, ap in points if queries == count) for count in counts]
        axes.plot(counts, means, color=colour, linewidth=1.6)
        axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, label=name, clip_on=False)
    axes.set(xlabel="queries in training", ylabel="AP")
    axes.margins(x=0.08)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({run.queries for run in result.runs}))
    if axes.lines:
        axes.legend(fontsize=9, loc="best", frameon=False)
    return figure
