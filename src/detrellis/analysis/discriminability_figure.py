"""The figure of `discriminability.py`: the curves of all runs, and some images with each run's map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from detrellis.analysis.discriminability import DiscriminabilityResult, RunDiscriminability, ScoredImage
from detrellis.analysis.figures import FAINT, as_written, canvas, colours, heading, shortened, tidy
from detrellis.analysis.pictures import outline
from detrellis.engine.console import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES, CELL = 5.2, (2.3, 1.95)  # inches: of the curves, and of one picture
EDGE = "#2EE6E6"  # of boxes: seen on all colours of the maps


def draw(result: DiscriminabilityResult) -> Figure:
    """The curves, and a column an image with each run's map. Raises `UserError` where matplotlib is missing."""
    shown = max((len(run.examples) for run in result.runs), default=0)
    rows = _rows(result.runs) if shown else []
    height = max(CURVES, CELL[1] * len(rows) + 0.6)
    figure = canvas(CURVES + CELL[0] * shown, height, f"Discriminability of the {result.of}")
    if not shown:
        _curves(figure.subplots(), result.runs)
        return figure
    left, right = figure.subfigures(1, 2, width_ratios=[CURVES, CELL[0] * shown], squeeze=False).flatten().tolist()
    _curves(left.subplots(), result.runs)
    _pictures(right, rows, shown)
    return figure


def _curves(axes: Axes, runs: Sequence[RunDiscriminability]) -> None:
    """Fig. 2."""
    tidy(axes)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=":", label="chance: 0.500")
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        curve, label = run.curve, f"{shortened(run.name)}: {number(run.curve.area)}"
        axes.plot([1, *curve.iob, 0], [1, *curve.iof, 0], color=colour, linewidth=1.6, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", anchor="N", xlabel="IoB, share of the background above S")
    axes.set_ylabel("IoF, share of the foreground above S")
    below = (0.0, -0.14)  # of the axes, within which the curves of weak encoders would cross it
    title = "area under the curve"
    as_written(
        axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=below, title=title, title_fontsize=9)
    )


class PictureRow(NamedTuple):
    """A row of pictures: the maps of a run, or the images that they are of."""

    title: str
    run: RunDiscriminability
    maps: bool


def _rows(runs: Sequence[RunDiscriminability]) -> list[PictureRow]:
    """The images once for neighbouring runs that were measured on the same ones."""
    rows: list[PictureRow] = []
    for run in runs:
        if not rows or _images(run) != _images(rows[-1].run):
            rows.append(PictureRow("image", run, maps=False))
        rows.append(PictureRow(run.name, run, maps=True))
    return rows


def _images(run: RunDiscriminability) -> tuple[str, list[tuple[int, ...]]]:
    """Which images a run shows, and in what size."""
    return run.data, [(e.row, *e.score.shape) for e in run.examples]


def _pictures(part: Any, rows: Sequence[PictureRow], shown: int) -> None:
    """Fig. 3."""
    grid = part.subplots(len(rows), shown, squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        heading(line[0], shortened(row.title))
        for axes, example in zip(line, row.run.examples, strict=False):
            if row.maps:
                _map(axes, example)
            else:
                axes.imshow(example.picture.pixels)
            outline(axes, example.picture, EDGE)


def _map(axes: Axes, example: ScoredImage) -> None:
    """From the lowest to the highest score of the image, which are told below it."""
    axes.imshow(example.score, cmap="magma")
    low, high = (round(float(x), 4) for x in (example.score.min(), example.score.max()))
    text = f"{low:g} to {high:g}"
    axes.text(0.5, -0.03, text, fontsize=8, color=FAINT, ha="center", va="top", transform=axes.transAxes)
