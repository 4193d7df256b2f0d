"""The figure of `misalignment.py`: histograms of IoU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from detrellis.analysis.figures import BLUE, FAINT, ORANGE, headline, panels
from detrellis.analysis.misalignment import EDGES, MisalignmentResult, RunMisalignment
from detrellis.engine.console import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(result: MisalignmentResult) -> Figure:
    """The histograms of BR and of HC, in one panel a run. Raises `UserError` where matplotlib is missing."""
    figure, grid = panels(len(result.runs), "Best-regressed (BR) and high-confidence (HC) queries")
    for run, axes in zip(result.runs, grid, strict=True):
        _histograms(axes, run, result.threshold)
    return figure


def _histograms(axes: Axes, run: RunMisalignment, threshold: float) -> None:
    values = run.statistics
    boxes = max(values.boxes, 1)
    axes.axvline(threshold, color=FAINT, linewidth=1, linestyle=":", label=f"HC needs IoU >= {threshold:g}")
    for name, counts, mean, colour in (
        ("BR, all boxes", values.br_histogram, values.br_iou, BLUE),
        (f"HC, {values.with_hc / boxes:.1%} of boxes", values.hc_histogram, values.hc_iou, ORANGE),
    ):
        percent = 100 * np.array(counts) / boxes
        axes.stairs(percent, EDGES, fill=True, color=colour, alpha=0.3)
        axes.stairs(percent, EDGES, color=colour, linewidth=1.4, label=f"{name}: mean {number(mean)}")
        if mean is not None:
            axes.axvline(mean, color=colour, linewidth=1.2, linestyle="--")
    hits = number(values.hit_rate, ".1%")
    headline(axes, run.name, f"gap {number(values.gap)}, hit rate {hits}, {values.boxes:,} boxes")
    axes.set(xlim=(0, 1), xlabel="IoU with the ground-truth box", ylabel="% of boxes")
    axes.margins(y=0.4)  # room for the legend; not set_ylim, which would fix the axis that all panels have in common
    axes.legend(fontsize=8, loc="upper left", facecolor="white", edgecolor="none", framealpha=0.9)
