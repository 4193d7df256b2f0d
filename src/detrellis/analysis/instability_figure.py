"""The figure of `instability.py`: IS along training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detrellis.analysis.figures import as_written, canvas, colours, shortened, tidy, whole_numbers
from detrellis.analysis.instability import InstabilityResult
from detrellis.engine.console import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(result: InstabilityResult) -> Figure:
    """IS by epoch, a curve a run. Raises `UserError` where matplotlib is missing."""
    figure = canvas(6.4, 4.2, "Instability of the matching")
    axes = figure.subplots()
    tidy(axes)
    for run, colour in zip(result.runs, colours(len(result.runs)), strict=True):
        label = f"{shortened(run.name)}: mean {number(run.mean)}"
        axes.plot(run.epochs[1:], run.instability, color=colour, linewidth=1.6, marker="o", markersize=4, label=label)
    axes.set(xlabel="epoch", ylabel="queries in an image that are matched anew")
    axes.set_ylim(bottom=0)
    whole_numbers(axes)
    as_written(axes.legend(fontsize=9, frameon=False))
    return figure
