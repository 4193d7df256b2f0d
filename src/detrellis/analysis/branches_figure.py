"""The figure of `branches.py`: the AP of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detrellis.analysis.branches import BranchesResult
from detrellis.analysis.figures import as_written, canvas, colours, shortened, tidy, value_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(result: BranchesResult) -> Figure:
    """AP by head, a bar a run. Raises `UserError` where matplotlib is missing."""
    heads, count = result.heads, len(result.runs)
    figure = canvas(max(5.6, 0.55 * len(heads) * count + 2), 4.2, "AP of each head on the same encoder")
    axes = figure.subplots()
    tidy(axes)
    width = 0.8 / count
    for i, (run, colour) in enumerate(zip(result.runs, colours(count), strict=True)):
        places = [heads.index(head) + (i - (count - 1) / 2) * width for head in run.heads]
        values = [evaluated.ap for evaluated in run.heads.values()]
        value_bars(axes, places, values, width * 0.92, color=colour, label=shortened(run.name))
    axes.set_xticks(range(len(heads)), heads)
    axes.set_xlim(-0.6, len(heads) - 0.4)
    axes.set_ylabel("AP")
    axes.margins(y=0.12)
    as_written(figure.legend(loc="outside lower left", fontsize=9, frameon=False))
    return figure
