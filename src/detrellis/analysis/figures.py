"""How all figures look. matplotlib is only needed, and only imported, for drawing."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from detrellis.analysis.runs import RunResult
from detrellis.engine.console import number
from detrellis.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
    from matplotlib.figure import SubFigure
    from matplotlib.legend import Legend
else:
    Axes = Figure = Any  # for annotations where matplotlib may be missing

# Okabe and Ito's colours: told apart by colour-blind readers, and in grey.
BLUE, ORANGE = "#0072B2", "#D55E00"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
INK, FAINT = "#222222", "#888888"
DPI = 150


def need_matplotlib() -> None:
    """Raises `UserError` where it is missing."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UserError(
            f"figures need matplotlib ({error})", 'pip install "detrellis[viz]"'
        ) from None


def canvas(width: float, height: float, title: str) -> Figure:
    """An empty figure, in inches, drawn by Agg: without a display, and without pyplot's list of
    open figures. Raises `UserError` where matplotlib is missing."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def tidy(axes: Axes) -> None:
    """How all panels with numbers look."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, labelbottom=True, color=FAINT)
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def colours(count: int) -> list[str]:
    """That many colours, told apart by everybody as long as there are no more than in `COLOURS`."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["turbo"](i / (count - 1))) for i in range(count)]


def panels(count: int, title: str, *, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure with one panel a run, at most `columns` side by side, all with the same axes."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = canvas(max(4.2 * columns, 5.6), 3.5 * rows + 0.5, title)
    grid = (
        figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    )
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        tidy(axes)
    return figure, grid[:count]


def run_rows(figure: Figure, runs: Sequence[RunResult], values: Sequence[str]) -> list[SubFigure]:
    """A part of the figure for each run, below each other;
    its title is the run's name and `values`.
    """
    parts: list[SubFigure] = figure.subfigures(len(runs), 1, squeeze=False).flatten().tolist()
    for part, run, text in zip(parts, runs, values, strict=True):
        title = f"{shortened(run.name)}: {text}"
        part.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left", parse_math=False)
    return parts


def heading(axes: Axes, title: str) -> None:
    """A panel's title, whatever is in it."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)


def headline(axes: Axes, name: str, values: str) -> None:
    """The title of a run's panel:
    the run's name, and below it the values that the panel is about.
    """
    heading(axes, f"{shortened(name)}\n{values}")


def shortened(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= 44 else f"...{name[-41:]}"


def as_written(legend: Legend) -> None:
    """Shows the names in a legend as they are, also those with a `$`."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def value_bars(
    axes: Axes,
    places: ArrayLike,
    values: Sequence[float | None],
    width: float,
    fontsize: int = 8,
    **look: Any,
) -> None:
    """Bars with their values above them, as ".123"; a dash where there is none."""
    bars = axes.bar(places, [value or 0 for value in values], width, **look)
    axes.bar_label(
        bars, [number(value).lstrip("0") for value in values], fontsize=fontsize, padding=2
    )


def whole_numbers(axes: Axes) -> None:
    """Marks on the x axis at whole numbers only, such as epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
