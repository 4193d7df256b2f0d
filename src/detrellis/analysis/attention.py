"""SAM-DETR++, Fig. 3 and 5: where one query looks,
layer by layer, and head by head in the last layer.

Of one picture, and in each run of one query, by default the one with the highest score. A layer's
map is the mean over heads of what its cross-attention gives each token; a token's weight is spread
over the pixels that it stands for, so that levels can be added. Padding is cut off before maps are
resized to the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from detrellis.analysis.attention_maps import (
    RecordedAttention,
    decode_recorded,
    head_points,
    head_weights,
)
from detrellis.analysis.figures import INK, Axes, Figure, canvas, shortened
from detrellis.analysis.outputs import refuse_without_boxes
from detrellis.analysis.pictures import Size, attention_score, levels
from detrellis.analysis.runs import ComparedRuns, Result, RunResult, add_run, as_json, run_table
from detrellis.arguments import Index, checked
from detrellis.data.batch import stack_images
from detrellis.data.decode import read_image
from detrellis.data.doctor.check import prepare_split
from detrellis.data.transforms import eval_transform
from detrellis.engine.console import number, track
from detrellis.engine.evaluate import evaluated_split
from detrellis.errors import UserError
from detrellis.loading import load_trained
from detrellis.predictions.model import Model
from detrellis.types import ImageBatch, Memory

LONGEST = 480  # pixels of a drawn picture's longer side


class LayerAttention(NamedTuple):
    """Where the query looks in one decoder layer;
    places are fractions of the image's width and height.
    """

    # (cx, cy, w, h) or a point (x, y) that the layer reads; None: it reads none
    reference: tuple[float, ...] | None
    points: Tensor | None  # (M, P, 2) where each head samples; None: it reads every token
    level: int | None  # the only one that it reads, 0 the finest; None: all
    maps: Tensor  # (M, H, W) each head's attention over the picture, the highest 1
    mean: Tensor  # (H, W) of all heads, the highest 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; the maps are in the figure only."""
        points = None if self.points is None else self.points.tolist()
        return {"reference": as_json(self.reference), "points": points, "level": self.level}


@dataclass(frozen=True)
class RunAttention(RunResult):
    """One run: what its query says in the last layer, and where it looks in each."""

    query: int
    label: str  # the class with the query's highest score
    score: float
    box: tuple[float, ...]  # (cx, cy, w, h) as fractions of the image
    layers: tuple[LayerAttention, ...]

    def to_dict(self) -> dict[str, Any]:
        values = {k: getattr(self, k) for k in ("name", "run", "query", "score")}
        layers = [layer.to_dict() for layer in self.layers]
        return values | {"class": self.label, "box": list(self.box), "layers": layers}


@dataclass(frozen=True)
class AttentionResult(Result):
    """One query of each of several runs, in the same picture."""

    name = "attention"
    runs: tuple[RunAttention, ...]
    image: str
    query: int | None  # asked for; None: the one with the highest score
    picture: NDArray[np.uint8]  # (H, W, 3)

    def table(self) -> Table:
        caption = (
            "One query a run. Centres (shares of width and height) tell whether runs show the "
            "same object."
        )
        columns = ("query", "class", "score", "centre")
        title = "Cross-attention of a query (SAM-DETR++)"
        table = run_table(title, caption, *columns, left=("class",), wrapped=columns)
        for run in self.runs:
            centre = ", ".join(f"{x:.2f}" for x in run.box[:2])
            add_run(table, run.name, str(run.query), run.label, number(run.score), centre)
        return table


@checked
def analyze(
    runs: ComparedRuns, *, image: str | Path | None = None, query: Index | None = None
) -> AttentionResult:
    """Read off where a query of each run looks in `image` (default: the first that the first run is
    measured on).

    `query` counts from 0 (default: the one with the highest score). Raises `UserError` where a
    detector has no such query, or there is no picture to look at.
    """
    path = _first_image(runs) if image is None else Path(image)
    if not path.is_file():
        raise UserError(f"{path}: no such file", "Name a picture: --image FILE.")
    pixels = read_image(path)
    places = list(zip(runs.places, runs.names, strict=True))
    measured = []
    for place, name in track(places, "analyze", len(places), runs.progress):
        model = load_trained(place, runs.device)
        measured.append(_measure(RunResult(name, str(place), str(path)), model, pixels, query))
    return AttentionResult(
        tuple(measured), str(path), query, drawable(pixels).movedim(0, -1).numpy()
    )


def _first_image(runs: ComparedRuns) -> Path:
    place = runs.places[0]
    model = load_trained(place, runs.device)
    if model.data is None and runs.options.data is None and runs.options.val is None:
        raise UserError(
            f"{place}: no run of ours, so its data are not known", "Name a picture: --image FILE."
        )
    source, split = evaluated_split(place, model.data, runs.options)
    annotations, _ = prepare_split(source, split, model.classes)
    return annotations.path(0)


def drawable(pixels: Tensor) -> Tensor:
    """A picture `(3, H, W)`, shrunk to a longer side of `LONGEST` if it is larger."""
    shrink = LONGEST / max(pixels.shape[1:])
    if shrink >= 1:
        return pixels
    size = [max(round(side * shrink), 1) for side in pixels.shape[1:]]
    smaller = F.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)[0]
    return smaller.round().clamp(0, 255).byte()


@torch.no_grad()
def _measure(run: RunResult, model: Model, pixels: Tensor, query: int | None) -> RunAttention:
    refuse_without_boxes(model, run.run)
    detector = model.detector
    memory = detector.encode(_batch(model, pixels))
    output, layers = decode_recorded(detector, memory)
    scores, boxes = detector.postprocess.scores(output)[0], output.boxes[-1, 0]
    if not (scores.isfinite().all() and boxes.isfinite().all()):
        raise UserError(
            f"{run.run}: its outputs are not finite", "Its training went wrong: take other weights."
        )

    if query is None:
        query = int(scores.amax(1).argmax())
    if query >= len(scores):
        raise UserError(
            f"{run.run}: no query {query}", f"It has {len(scores)}: take 0 to {len(scores) - 1}."
        )
    label = int(scores[query].argmax())
    height, width = drawable(pixels).shape[1:]
    return RunAttention(
        name=run.name,
        run=run.run,
        data=run.data,
        query=query,
        label=model.classes.names[label],
        score=float(scores[query, label]),
        box=tuple(boxes[query].tolist()),
        layers=tuple(layer_attention(layer, memory, query, (height, width)) for layer in layers),
    )


def _batch(model: Model, pixels: Tensor) -> ImageBatch:
    """The picture as the detector sees it."""
    data = model.recipe.data
    if data.pad is not None:
        raise UserError(
            f"data.pad={data.pad}: attention to padding cannot be drawn", "Take another run."
        )
    transform = eval_transform(data.size, **data.resizing())
    resized, *_ = transform(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return stack_images([resized], transform.pad_to, model.normalise).to(model.device)


def layer_attention(
    layer: RecordedAttention, memory: Memory, query: int, size: Size
) -> LayerAttention:
    """Where a query of a batch's first image looks, with maps of `size`."""
    (x, where, _), points = layer.call, head_points(*layer)
    chosen = x.new_zeros(x.shape[:2])
    chosen[0, query] = 1
    weights = head_weights(*layer, chosen)
    assert weights is not None, f"what {type(layer.attention).__name__} attends to is not known"
    heads = weights[0].cpu()
    references = None if where.references is None else where.references.expand(len(x), -1, -1)
    return LayerAttention(
        None if references is None else tuple(references[0, query].tolist()),
        None if points is None else points[0, query].cpu(),
        getattr(layer.attention, "level", None),
        torch.stack([_map(head, memory, size) for head in heads]),
        _map(heads.mean(0), memory, size),
    )


def _map(weights: Tensor, memory: Memory, size: Size) -> Tensor:
    """`(H, W)` from one weight a token of the batch's first image."""
    return attention_score(levels(weights, memory, 0), size)


# The figure
# Inches: of the whole figure's width and of a panel at most; above each part, each row and each
# panel; between panels.
WIDTH, LARGEST = 14.0, 3.0
PART, ROW, NAME, GAP, LEGEND = 0.42, 0.34, 0.15, 0.08, 0.45
# The last of viridis
REFERENCE, POINT, RESULT, HIGHEST = "#FF2020", "#00F0F0", "#FFFFFF", "#FDE725"
# Of a grey picture's light, what is left; how much of it the most attention hides
DIM, COVER = 0.6, 0.8
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
    """Fig. 3 above, Fig. 5 below, a row a run in each.
    Raises `UserError` where matplotlib is missing.
    """
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
        figure.text(
            GAP / WIDTH,
            (top - 0.14) / all_of_it,
            name,
            fontsize=10,
            color=INK,
            va="top",
            parse_math=False,
        )
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
    """The picture `(H, W, 3)` in dimmed grey, the more covered by colour the more attention:
    `(H, W, 3)` in [0, 1].
    """
    from matplotlib import colormaps

    grey = DIM * np.repeat(picture.mean(-1, keepdims=True) / 255, 3, axis=-1)
    values = heat.double().numpy()
    colour = colormaps["viridis"](DARKEST + (1 - DARKEST) * values)[..., :3]
    cover = COVER * values[..., None]
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
        Line2D(
            [], [], color=REFERENCE, path_effects=rim, label="box (+: point) that the layer reads"
        ),
        Line2D(
            [],
            [],
            color=POINT,
            marker="o",
            linestyle="",
            markeredgecolor="black",
            label="where heads sample",
        ),
        Patch(color=HIGHEST, label="attention: the panel's highest"),
    ]
    figure.legend(handles=entries, loc="lower left", ncols=4, fontsize=9, frameon=False)
