"""The figure of `discriminability.py`: the curves of all runs, and some images with each run's map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detrellis.analysis.figures import FAINT, INK, canvas, colours, shortened, tidy
from detrellis.analysis.pictures import outline
from detrellis.engine.console import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from detrellis.analysis.discriminability import Comparison, Example, Measured

CURVES, CELL = 5.2, (2.3, 1.95)  # inches: of the curves, and of one picture
EDGE = "#2EE6E6"  # of boxes: seen on all colours of the maps


def draw(found: Comparison) -> Figure:
    """The curves on the left; on the right a column an image, with a row for the image and one for each run's map."""
    shown = max((len(run.examples) for run in found.runs), default=0)
    rows = _rows(found.runs) if shown else []
    height = max(CURVES, CELL[1] * len(rows) + 0.6)
    figure = canvas(CURVES + CELL[0] * shown, height, f"Discriminability of the {found.of}")
    if not shown:
        _curves(figure.subplots(), found)
        return figure
    left, right = figure.subfigures(1, 2, width_ratios=[CURVES, CELL[0] * shown], squeeze=False).flatten().tolist()
    _curves(left.subplots(), found)
    _pictures(right, rows, shown)
    return figure


def _curves(axes: Axes, found: Comparison) -> None:
    """Fig. 2."""
    tidy(axes)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=":", label="chance: 0.500")
    for run, colour in zip(found.runs, colours(len(found.runs)), strict=True):
        curve, label = run.curve, f"{shortened(run.name)}: {number(run.curve.area)}"
        axes.plot([1, *curve.iob, 0], [1, *curve.iof, 0], color=colour, linewidth=1.6, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", anchor="N", xlabel="IoB, share of the background above S")
    axes.set_ylabel("IoF, share of the foreground above S")
    below = (0.0, -0.14)  # of the axes, within which the curves of weak encoders would cross it
    title = "area under the curve"
    legend = axes.legend(
        fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=below, title=title, title_fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


Row = tuple[str, "Measured", bool]  # title, run, whether the maps are drawn or the images themselves


def _rows(runs: Sequence[Measured]) -> list[Row]:
    """The images once for neighbouring runs that were measured on the same ones."""
    rows: list[Row] = []
    for run in runs:
        if not rows or _images(run) != _images(rows[-1][1]):
            rows.append(("image", run, False))
        rows.append((run.name, run, True))
    return rows


def _images(run: Measured) -> tuple[str, list[tuple[int, ...]]]:
    """Which images a run shows, and in what size."""
    return run.data, [(e.row, *e.score.shape) for e in run.examples]


def _pictures(part: Any, rows: Sequence[Row], shown: int) -> None:
    """Fig. 3."""
    grid = part.subplots(len(rows), shown, squeeze=False)
    for line, (title, run, maps) in zip(grid, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        line[0].set_title(shortened(title), fontsize=10, color=INK, loc="left", parse_math=False)
        for axes, example in zip(line, run.examples, strict=False):
            if maps:
                _map(axes, example)
            else:
                axes.imshow(example.picture.pixels)
            outline(axes, example.picture, EDGE)


def _map(axes: Axes, example: Example) -> None:
    """From the lowest to the highest score of the image, which are told below it."""
    axes.imshow(example.score, cmap="magma")
    low, high = (round(float(x), 4) for x in (example.score.min(), example.score.max()))
    text = f"{low:g} to {high:g}"
    axes.text(0.5, -0.03, text, fontsize=8, color=FAINT, ha="center", va="top", transform=axes.transAxes)
