"""SAM-DETR++, Fig. 3 and 5: where one query looks, layer by layer, and head by head in the last layer.

Of one picture, and in each run of one query, by default the one with the highest score. A layer's map is the mean over
heads of what its cross-attention gives each token; a token's weight is spread over the pixels that it stands for, so
that levels can be added. Padding is cut off before maps are resized to the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from detrellis.analysis.attention_maps import Layer, decoded, head_points, head_weights
from detrellis.analysis.discriminability import Size, attention_score, levels
from detrellis.analysis.figures import Result, sheet
from detrellis.analysis.outputs import listed, run_names
from detrellis.arguments import Index, checked
from detrellis.data.decode import read_image
from detrellis.data.doctor.check import prepare_split
from detrellis.data.layout import DataSource
from detrellis.data.loader import stack_images
from detrellis.data.transforms import eval_transform
from detrellis.engine.console import number, track
from detrellis.errors import UserError
from detrellis.loading import load_trained
from detrellis.predictions.model import Model
from detrellis.types import ImageBatch, Memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

LONGEST = 480  # pixels of a drawn picture's longer side


class Look(NamedTuple):
    """Where the query looks in one decoder layer; places are shares of the image's width and height."""

    reference: tuple[float, ...] | None  # (cx, cy, w, h) or a point (x, y) that the layer reads; None: it reads none
    points: Tensor | None  # (M, P, 2) where each head samples; None: it reads every token
    level: int | None  # the only one that it reads, 0 the finest; None: all
    maps: Tensor  # (M, H, W) each head's attention over the picture, the highest 1
    mean: Tensor  # (H, W) of all heads, the highest 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; the maps are in the figure only."""
        points = None if self.points is None else self.points.tolist()
        return {"reference": self.reference and list(self.reference), "points": points, "level": self.level}


@dataclass(frozen=True)
class Measured:
    """One run, and what its query says in the last layer."""

    name: str
    run: str
    query: int
    label: str  # the class with the query's highest score
    score: float
    box: tuple[float, ...]  # (cx, cy, w, h) as shares of the image
    layers: tuple[Look, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        named = {k: getattr(self, k) for k in ("name", "run", "query", "score")}
        layers = [look.to_dict() for look in self.layers]
        return named | {"class": self.label, "box": list(self.box), "layers": layers}


@dataclass(frozen=True)
class Comparison(Result):
    """One query of each of several runs, in the same picture."""

    name = "attention"

    image: str
    query: int | None  # asked for; None: the one with the highest score
    picture: NDArray[np.uint8]  # (H, W, 3)
    runs: tuple[Measured, ...]

    def settings(self) -> dict[str, Any]:
        """What was drawn."""
        return {"image": self.image, "query": self.query}

    def table(self) -> Table:
        """One row a run, for a rich console."""
        from rich.text import Text

        caption = "One query a run. Centres (shares of width and height) tell whether runs show the same object."
        table = sheet("Cross-attention of a query (SAM-DETR++)", caption)
        for column in ("query", "class", "score", "centre"):
            table.add_column(column, justify="left" if column == "class" else "right", overflow="fold")
        for run in self.runs:  # Text: names may be "[bold]"
            centre = ", ".join(f"{x:.2f}" for x in run.box[:2])
            table.add_row(Text(run.name), str(run.query), Text(run.label), number(run.score), centre)
        return table

    def figure(self) -> Figure:
        """A row a run: its layers, then the heads of its last layer. Raises `UserError` without matplotlib."""
        from detrellis.analysis.attention_figure import draw

        return draw(self)


@checked
def analyze(
    runs: str | Path | Sequence[str | Path],
    *,
    image: str | Path | None = None,
    query: Index | None = None,
    names: Sequence[str] | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Comparison:
    """Where a query of one run or several looks in `image` (default: the first of the first run's validation split).

    `query` counts from 0 (default: the one with the highest score), `names` is what the runs are called (default: their
    folders). Raises `UserError` where a detector has no such query, or there is no picture to look at.
    """
    places = listed(runs)
    called = run_names(places, names)
    path = _first_image(places[0], device) if image is None else Path(image)
    if not path.is_file():
        raise UserError(f"{path}: no such file", "Name a picture: --image FILE.")
    pixels = read_image(path)
    pairs = track(list(zip(places, called, strict=True)), "analyze", len(places), progress)
    found = tuple(_measure(str(place), name, load_trained(place, device), pixels, query) for place, name in pairs)
    return Comparison(str(path), query, drawable(pixels).movedim(0, -1).numpy(), found)


def _first_image(run: str | Path, device: str | None) -> Path:
    model = load_trained(run, device)
    if model.data is None:
        raise UserError(f"{run}: no run of ours, so its data are not known", "Name a picture: --image FILE.")
    annotations, _ = prepare_split(DataSource.from_dict(model.data), "val", model.classes)
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
def _measure(run: str, name: str, model: Model, pixels: Tensor, query: int | None) -> Measured:
    detector = model.detector
    memory = detector.encode(_batch(model, pixels))
    output, layers = decoded(detector, memory)
    scores, boxes = detector.postprocess.scores(output)[0], output.boxes[-1, 0]
    if not (scores.isfinite().all() and boxes.isfinite().all()):
        raise UserError(f"{run}: its outputs are not finite", "Its training went wrong: take other weights.")
    if query is None:
        query = int(scores.amax(1).argmax())
    if query >= len(scores):
        raise UserError(f"{run}: no query {query}", f"It has {len(scores)}: take 0 to {len(scores) - 1}.")
    label = int(scores[query].argmax())
    height, width = drawable(pixels).shape[1:]
    looks = tuple(look(layer, memory, query, (height, width)) for layer in layers)
    score, box = float(scores[query, label]), tuple(boxes[query].tolist())
    return Measured(name, run, query, model.classes.names[label], score, box, looks)


def _batch(model: Model, pixels: Tensor) -> ImageBatch:
    """The picture as the detector sees it."""
    data = model.recipe.data
    transform = eval_transform(data.size, **data.resizing())
    resized, *_ = transform(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return stack_images([resized], transform.pad_to).to(model.device)


def look(layer: Layer, memory: Memory, query: int, size: Size) -> Look:
    """Where a query of a batch's first image looks, with maps of `size`."""
    (x, where, _), points = layer.call, head_points(*layer)
    chosen = x.new_zeros(x.shape[:2])
    chosen[0, query] = 1
    weights = head_weights(*layer, chosen)
    assert weights is not None, f"what {type(layer.attention).__name__} attends to is not known"
    own = weights[0].cpu()
    references = None if where.references is None else where.references.expand(len(x), -1, -1)
    return Look(
        None if references is None else tuple(references[0, query].tolist()),
        None if points is None else points[0, query].cpu(),
        getattr(layer.attention, "level", None),
        torch.stack([_map(head, memory, size) for head in own]),
        _map(own.mean(0), memory, size),
    )


def _map(weights: Tensor, memory: Memory, size: Size) -> Tensor:
    """`(H, W)` from one weight a token of the batch's first image."""
    return attention_score(levels(weights, memory, 0), size)
