"""The figure of `attention.py`: each run's layers, then the heads of its last layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from detrellis.analysis.attention import AttentionResult, LayerAttention, RunAttention
from detrellis.analysis.figures import INK, canvas, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches: of the whole figure's width and of a panel at most; above each part, each row and each panel; between panels.
WIDTH, LARGEST = 14.0, 3.0
PART, ROW, NAME, GAP, LEGEND = 0.42, 0.34, 0.15, 0.08, 0.45
REFERENCE, POINT, RESULT, HIGHEST = "#FF2020", "#00F0F0", "#FFFFFF", "#FDE725"  # the last of viridis
DIM, COVER = 0.6, 0.8  # of a grey picture's light, what is left; how much of it the most attention hides
DARKEST = 0.35  # colour of no attention, in viridis: what is darker would not show on the picture
FEW = 8  # points that are drawn large

Places = tuple[float, ...]  # (cx, cy, w, h) or (x, y)


class Panel(NamedTuple):
    """What is drawn over one picture; nothing but the result where there is no map."""

    title: str
    map: Tensor | None = None  # (H, W)
    reference: Places | None = None
    points: Tensor | None = None  # (P, 2)


class Part(NamedTuple):
    """Rows of panels, one a run, all of one size."""

    title: str
    rows: Sequence[Sequence[Panel]]

    def panel(self, picture: NDArray[np.uint8]) -> tuple[float, float]:
        """Width and height of a panel, in inches."""
        width = min((WIDTH - GAP) / max(len(row) for row in self.rows) - GAP, LARGEST)
        return width, width * picture.shape[0] / picture.shape[1]

    def height(self, picture: NDArray[np.uint8]) -> float:
        """In inches."""
        return PART + len(self.rows) * (ROW + NAME + self.panel(picture)[1])


def draw(result: AttentionResult) -> Figure:
    """Fig. 3 above, Fig. 5 below, a row a run in each. Raises `UserError` where matplotlib is missing."""
    parts = [
        Part("Every decoder layer, mean of its heads", [_layers(run) for run in result.runs]),
        Part("The last decoder layer, head by head", [_heads(run) for run in result.runs]),
    ]
    height = sum(part.height(result.picture) for part in parts) + LEGEND
    figure = canvas(WIDTH, height, "")
    figure.set_layout_engine("none")  # all panels of a part have one size
    top = height
    for part in parts:
        _part(figure, part, result, top)
        top -= part.height(result.picture)
    _legend(figure)
    return figure


def _part(figure: Figure, part: Part, result: AttentionResult, top: float) -> None:
    """From `top` downwards, in inches from the figure's bottom."""
    all_of_it = figure.get_figheight()
    width, height = part.panel(result.picture)
    figure.text(GAP / WIDTH, (top - 0.18) / all_of_it, part.title, fontsize=12, color=INK, va="top")
    top -= PART
    for run, row in zip(result.runs, part.rows, strict=True):
        name = f"{shortened(run.name)}: {run.label} {run.score:.2f}, query {run.query}"
        figure.text(GAP / WIDTH, (top - 0.14) / all_of_it, name, fontsize=10, color=INK, va="top", parse_math=False)
        top -= ROW + NAME + height
        for i, panel in enumerate(row):
            left = GAP + i * (width + GAP)
            place = (left / WIDTH, top / all_of_it, width / WIDTH, height / all_of_it)
            _panel(figure.add_axes(place), result.picture, panel, run.box)


def _layers(run: RunAttention) -> list[Panel]:
    """The result, and each layer."""
    return [Panel("result"), *(_layer(i, layer) for i, layer in enumerate(run.layers))]


def _layer(index: int, layer: LayerAttention) -> Panel:
    title = f"layer {index + 1}" + ("" if layer.level is None else f", level {layer.level + 1}")
    points = None if layer.points is None else layer.points.flatten(0, 1)
    return Panel(title, layer.mean, layer.reference, points)


def _heads(run: RunAttention) -> list[Panel]:
    layer = run.layers[-1]
    points = [None] * len(layer.maps) if layer.points is None else list(layer.points)
    heads = enumerate(zip(layer.maps, points, strict=True))
    return [Panel(f"head {i + 1}", heat, layer.reference, places) for i, (heat, places) in heads]


def _panel(axes: Axes, picture: NDArray[np.uint8], panel: Panel, result: Places) -> None:
    """One panel; coordinates are fractions of the picture."""
    axes.set_axis_off()
    axes.set_title(panel.title, fontsize=8, color=INK, pad=2)
    pixels = picture if panel.map is None else heated(picture, panel.map)
    axes.imshow(pixels, extent=(0, 1, 1, 0), aspect="auto")
    if panel.map is None or len(panel.reference or ()) < 4:
        _mark(axes, result, RESULT)
    if panel.reference is not None:
        _mark(axes, panel.reference, REFERENCE)
    if panel.points is not None:
        area, rim = (16, 0.5) if len(panel.points) <= FEW else (3, 0.2)
        x, y = panel.points.T.numpy()
        axes.scatter(x, y, s=area, c=POINT, edgecolors="black", linewidths=rim, zorder=3)
    axes.set(xlim=(0, 1), ylim=(1, 0))


def heated(picture: NDArray[np.uint8], heat: Tensor) -> NDArray[np.float64]:
    """The picture `(H, W, 3)` in dimmed grey, the more covered by colour the more attention: `(H, W, 3)` in [0, 1]."""
    from matplotlib import colormaps

    grey = DIM * np.repeat(picture.mean(-1, keepdims=True) / 255, 3, axis=-1)
    values = heat.double().numpy()
    colour, cover = colormaps["viridis"](DARKEST + (1 - DARKEST) * values)[..., :3], COVER * values[..., None]
    mixed: NDArray[np.float64] = grey * (1 - cover) + colour * cover
    return mixed


def _mark(axes: Axes, place: Places, colour: str) -> None:
    """A box, or a point, with a dark rim that shows on anything."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    if len(place) == 4:
        cx, cy, w, h = place
        box = Rectangle((cx - w / 2, cy - h / 2), w, h, fill=False, edgecolor=colour, linewidth=1.2)
        box.set_path_effects([withStroke(linewidth=2, foreground="black")])
        axes.add_patch(box)
    else:
        axes.scatter(place[0], place[1], s=40, c=colour, marker="+", linewidths=1.6, zorder=3)


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=2.3, foreground="black")]
    entries = [
        Line2D([], [], color=RESULT, path_effects=rim, label="what the query finds"),
        Line2D([], [], color=REFERENCE, path_effects=rim, label="box (+: point) that the layer reads"),
        Line2D([], [], color=POINT, marker="o", linestyle="", markeredgecolor="black", label="where heads sample"),
        Patch(color=HIGHEST, label="attention: the panel's highest"),
    ]
    figure.legend(handles=entries, loc="lower left", ncols=4, fontsize=9, frameon=False)
