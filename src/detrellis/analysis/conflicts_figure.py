"""The figure of `conflicts.py`: a row of panels a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from detrellis.analysis.conflicts import ConflictsResult, MappedImage, RunConflicts
from detrellis.analysis.figures import BLUE, FAINT, INK, ORANGE, canvas, heading, run_rows, tidy
from detrellis.analysis.pictures import outline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALUES, CELL, HEIGHT = 7.6, 2.1, 3.9  # inches: width of the matrix and the bars, of a picture; height of a run


def draw(result: ConflictsResult) -> Figure:
    """The runs below each other, on one scale, with some maps. Raises `UserError` where matplotlib is missing."""
    runs = result.runs
    columns = max(1 + len(run.heads) for run in runs)
    figure = canvas(VALUES + CELL * columns, HEIGHT * len(runs) + 0.5, "Conflicts between heads")
    highest = max(max(row) for run in runs for row in run.matrix)
    tallest = max(max(run.conflicts) for run in runs)
    distances = [f"distance {run.distance:.2f} (mean of {run.images:,} images)" for run in runs]
    for run, part in zip(runs, run_rows(figure, runs, distances), strict=True):
        halves = part.subfigures(1, 2, width_ratios=[VALUES, CELL * columns], squeeze=False)
        values, pictures = halves.flatten().tolist()
        left, right = values.subplots(1, 2, width_ratios=[1.15, 1])
        _matrix(left, run, highest)
        _bars(right, run, tallest)
        _examples(pictures, run, columns)
    return figure


def _matrix(axes: Axes, run: RunConflicts, highest: float) -> None:
    """Fig. 8 and 9."""
    axes.imshow(run.matrix, cmap="Blues", vmin=0, vmax=highest)
    places = range(len(run.heads))
    axes.set_xticks(places, run.heads, rotation=45 if len(run.heads) > 3 else 0, fontsize=9)
    axes.set_yticks(places, run.heads, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for i, j in np.ndindex(len(run.heads), len(run.heads)):
        value = run.matrix[i][j]
        colour = "white" if value > 0.6 * highest else INK
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    heading(axes, "KL of the row's map from the column's")


def _bars(axes: Axes, run: RunConflicts, tallest: float) -> None:
    """Eq. 12."""
    tidy(axes)
    colours = [ORANGE, *[BLUE] * (len(run.heads) - 1)]
    bars = axes.bar(run.heads, run.conflicts, color=colours, width=0.65)
    axes.bar_label(bars, [f"{v:.2f}" for v in run.conflicts], fontsize=8, padding=2)
    axes.set_xticks(range(len(run.heads)), run.heads, rotation=45 if len(run.heads) > 3 else 0, fontsize=9)
    axes.set_ylim(0, 1.1 * tallest)
    heading(axes, "conflict S of each head with the others")


def _examples(part: Any, run: RunConflicts, columns: int) -> None:
    """A row an image: itself, and each head's map."""
    grid = part.subplots(len(run.examples), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, example in zip(grid, run.examples, strict=True):
        _example(line, example)
    for axes, title in zip(grid[0], ("image", *run.heads), strict=False):
        axes.set_title(title, fontsize=9, color=FAINT)


def _example(line: Any, example: MappedImage) -> None:
    height, width = example.picture.pixels.shape[:2]
    line[0].imshow(example.picture.pixels)
    outline(line[0], example.picture)
    for axes, heat in zip(line[1:], example.maps, strict=False):
        # In pixels of the image, whose boxes are drawn over it.
        axes.imshow(heat, cmap="magma", vmin=0, vmax=1, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        outline(axes, example.picture)
