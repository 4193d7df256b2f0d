"""How all figures look, and where they are written. matplotlib is only needed, and only imported, for drawing."""

from __future__ import annotations

import importlib
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from detrellis.errors import UserError
from detrellis.outputs import Outputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

# Okabe and Ito's colours: told apart by colour-blind readers, and in grey.
BLUE, ORANGE = "#0072B2", "#D55E00"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
INK, FAINT = "#222222", "#888888"
DPI = 150


class Files(NamedTuple):
    """What `save` wrote."""

    figure: Path
    numbers: Path


def need_matplotlib() -> None:
    """Raises `UserError` where it is missing."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UserError(f"figures need matplotlib ({error})", 'pip install "detrellis[viz]"') from None


def ready(out: Path, name: str, inputs: Iterable[Path] = ()) -> None:
    """Raises `UserError` where the figure of measurement `name` could not be drawn, or not be written without losing
    something: to ask before minutes of measuring."""
    need_matplotlib()
    Outputs(out).ready((f"{name}.png", f"{name}.json"), inputs)


@dataclass(frozen=True)
class OfRun:
    """What every measurement says of one run."""

    name: str  # what figures and tables call it
    run: str
    data: str  # the annotations it was measured on


class Result(ABC):
    """What every measurement returns: several runs, measured in the same way."""

    name: ClassVar[str]
    runs: Sequence[Any]  # of each, what was found, with `to_dict`

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What it was measured with."""

    @abstractmethod
    def table(self) -> Table:
        """One row a run, for a rich console."""

    @abstractmethod
    def figure(self) -> Figure:
        """The paper's figure. Raises `UserError` where matplotlib is missing."""

    def to_dict(self) -> dict[str, Any]:
        """Settings and numbers, as JSON holds them."""
        return {"measurement": self.name, "settings": self.settings(), "runs": [run.to_dict() for run in self.runs]}

    def save(self, out: str | Path) -> Files:
        """Write `OUT/NAME.png` and `OUT/NAME.json`, over those of an earlier measurement only."""
        ready(Path(out), self.name)
        outputs, picture = Outputs(out), io.BytesIO()
        self.figure().savefig(picture, format="png", dpi=DPI)
        numbers = json.dumps(self.to_dict(), indent=1)
        return Files(outputs.write(f"{self.name}.png", picture.getvalue()), outputs.write(f"{self.name}.json", numbers))


def sheet(title: str, caption: str) -> Table:
    """A table whose first column names the run; narrow enough for 80 letters."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    table.add_column("run", overflow="fold")
    return table


def canvas(width: float, height: float, title: str) -> Figure:
    """An empty figure, in inches. It is drawn by Agg, without a display and without pyplot's list of open figures."""
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
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        tidy(axes)
    return figure, grid[:count]


def headline(axes: Axes, name: str, numbers: str) -> None:
    """A panel's title: the run's name, whatever is in it, and below it the numbers that the panel is about."""
    axes.set_title(f"{shortened(name)}\n{numbers}", fontsize=10, color=INK, loc="left", parse_math=False)


def shortened(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= 44 else f"...{name[-41:]}"
