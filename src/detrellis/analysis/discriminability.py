"""Co-DETR, Eq. 7 and 8: how well the encoder's features, or the decoder's attention, tell objects from background.

A map of scores D in [0, 1] over the pixels of an image, as the detector sees it (resized, without padding):

* of the encoder: each level's norm over channels, resized to the image and divided by its maximum; mean over levels;
* of attention, which the paper leaves open: what the queries that are matched to a box attend to, mean over heads,
  layers and these queries; a token's weight is spread over the pixels that it stands for; divided by the maximum.

A pixel is foreground if its centre is strictly inside a box that is not a crowd region. IoF(S) and IoB(S) are the
shares of the foreground and of the background with D > S: the curve of the one over the other is a ROC curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis.analysis.attention_maps import decoded, token_weights
from detrellis.analysis.figures import OfRun, Result, sheet
from detrellis.analysis.outputs import batches, check_finite, each_run, one_to_one, split_name
from detrellis.analysis.pictures import Picture, picture
from detrellis.arguments import Images, checked
from detrellis.boxes import cxcywh_to_xyxy
from detrellis.data.loader import Batch
from detrellis.distributed import all_gather
from detrellis.engine.console import number
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.recipes.build import build_supervision
from detrellis.training import image_sizes
from detrellis.types import Memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# S goes from 0 to 1 in this many steps. The paper does not say how many it takes; few would do for attention, but norms
# behind a LayerNorm are nearly equal, and D may lie between 0.998 and 1.
STEPS = 2**16
POINTS = 100  # of a curve that are drawn and written
IMAGES = 4  # with their maps in the figure
SMALLEST = 1e-30  # a map that is 0 everywhere stays so

Of = Literal["encoder", "attention"]
Size = tuple[int, int]  # height, width


def resized(level: Tensor, size: Size) -> Tensor:
    """`(h, w)` to `(H, W)`, bilinear between the centres of pixels."""
    return F.interpolate(level[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def feature_score(norms: Sequence[Tensor], size: Size) -> Tensor:
    """Eq. 7: D `(H, W)` from each level's norms over channels `(h, w)`, none of which is padding."""
    maps = [resized(level, size) for level in norms]
    return torch.stack([m / m.max().clamp(min=SMALLEST) for m in maps]).mean(0)


def attention_score(weights: Sequence[Tensor], size: Size) -> Tensor:
    """D `(H, W)` from each level's weights `(h, w)`: attention per pixel, so that a level counts as much as it is
    attended to, however coarse it is."""
    total = torch.stack([resized(level, size) * level.numel() for level in weights]).sum(0)
    return total / total.max().clamp(min=SMALLEST)


def foreground(boxes: Tensor, size: Size) -> Tensor:
    """`(H, W)` bool: pixels whose centre is strictly inside one of `boxes (n, 4)`, pixel `xyxy`."""
    y, x = (torch.arange(n, dtype=boxes.dtype, device=boxes.device) + 0.5 for n in size)
    x1, y1, x2, y2 = boxes.T[..., None]  # (n, 1) each
    rows, columns = (y > y1) & (y < y2), (x > x1) & (x < x2)
    boxes_around: Tensor = rows.T.float() @ columns.float()
    return boxes_around > 0


def shares_above(score: Tensor, where: Tensor, thresholds: Tensor) -> Tensor:
    """Eq. 8: the share of the pixels `where` with a score above each of the `thresholds (K,)`; float64, NaN if none."""
    inside = score[where].sort().values
    return 1 - torch.searchsorted(inside, thresholds.to(inside), right=True).double() / len(inside)


class Curve(NamedTuple):
    """IoF over IoB, in the order of rising thresholds."""

    thresholds: tuple[float, ...]
    iof: tuple[float, ...]
    iob: tuple[float, ...]
    area: float  # under the curve of all thresholds: 0.5 for a map that knows nothing, 1 for one that knows all

    @classmethod
    def of(cls, thresholds: Tensor, shares: Tensor, points: int = POINTS) -> Curve:
        """From IoF and IoB `(2, K)` at each of `thresholds (K,)`; about `points` of them are kept.

        The curve is continued to (1, 1) for the area: pixels of score 0 are above no threshold.
        """
        iof, iob = torch.cat([shares.new_ones(2, 1), shares, shares.new_zeros(2, 1)], dim=1)
        way = 1 - shares.mean(0)  # from (1, 1) to (0, 0), never back
        marks = torch.linspace(float(way[0]), float(way[-1]), points + 1, dtype=way.dtype)
        kept = torch.searchsorted(way, marks).clamp(max=len(way) - 1).unique()
        drawn = [tuple(t[kept].tolist()) for t in (thresholds, *shares)]
        return cls(drawn[0], drawn[1], drawn[2], -float(torch.trapezoid(iof, iob)))


class Example(NamedTuple):
    """An image to be drawn with its map."""

    row: int  # its place in the annotations
    picture: Picture
    score: Tensor  # (H, W)


@dataclass(frozen=True)
class Measured(OfRun):
    """One run. The curve's shares are means over the images that have both foreground and background."""

    images: int
    skipped: int  # images without foreground or without background
    curve: Curve
    examples: tuple[Example, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; the examples are in the figure only."""
        named = {k: getattr(self, k) for k in ("name", "run", "data", "images", "skipped")}
        return named | {k: list(v) if isinstance(v, tuple) else v for k, v in self.curve._asdict().items()}


@dataclass(frozen=True)
class Comparison(Result):
    """Several runs, measured in the same way."""

    name = "discriminability"

    of: Of
    split: str
    runs: tuple[Measured, ...]

    def settings(self) -> dict[str, Any]:
        """What it was measured with."""
        return {"of": self.of, "split": self.split, "steps": STEPS}

    def table(self) -> Table:
        """One row a run, for a rich console."""
        from rich.text import Text

        caption = (
            "Area under the curve of IoF over IoB (shares of foreground and background above a threshold), means over "
            "images: 0.5 is chance. Images without a box, or that boxes cover, are left out."
        )
        table = sheet(f"Discriminability of the {self.of} (Co-DETR)", caption)
        for column in ("images", "left out", "area"):
            table.add_column(column, justify="right", no_wrap=True)
        for run in self.runs:  # Text: a run may be called "[bold]"
            table.add_row(Text(run.name), str(run.images), str(run.skipped), number(run.curve.area))
        return table

    def figure(self) -> Figure:
        """The curves, and some images with their maps. Raises `UserError` without matplotlib."""
        from detrellis.analysis.discriminability_figure import draw

        return draw(self)


@checked
def analyze(
    runs: str | Path | Sequence[str | Path],
    *,
    of: Of = "encoder",
    images: Images = IMAGES,
    names: Sequence[str] | None = None,
    device: str | None = None,
    progress: bool = False,
    **on: Unpack[EvalOptions],
) -> Comparison:
    """Measure one run or several, each on its own validation split or on what `on` says (see `engine/evaluate.py`).

    `of` is what the maps are of, `images` how many the figure shows, `names` what the runs are called (default: their
    folders). Raises `UserError` where no image has both foreground and background.
    """
    measured = each_run(runs, names, device, progress, on, partial(_measure, of, images))
    return Comparison(of, split_name(on), measured)


def _measure(of: Of, images: int, opened: OpenedSplit, name: str, show: bool) -> Measured:
    thresholds = torch.arange(STEPS + 1) / STEPS
    total, count = torch.zeros(2, STEPS + 1, dtype=torch.float64), 0  # IoF and IoB, summed over images
    examples: list[Example] = []
    for example, inside in _scored(opened, of, show):
        total += torch.stack([shares_above(example.score, part, thresholds) for part in (inside, ~inside)]).cpu()
        count += 1
        if len(examples) < images:
            examples.append(example._replace(score=example.score.cpu()))
    totals, counts, drawn = zip(*all_gather((total, count, examples)), strict=True)
    measured = sum(counts)
    if not measured:
        raise UserError(
            f"{opened.files}: no image with both foreground and background", "Take another --split or --data."
        )
    curve = Curve.of(thresholds, torch.stack(totals).sum(0) / measured)
    first = sorted((e for part in drawn for e in part), key=lambda e: e.row)[:images]
    skipped = len(opened.annotations) - measured
    return Measured(name, opened.run, opened.files, measured, skipped, curve, tuple(first))


def _scored(opened: OpenedSplit, of: Of, show: bool) -> Iterator[tuple[Example, Tensor]]:
    """Every image of this process's share that has both foreground `(H, W)`, given beside it, and background."""
    rows = {int(image_id): row for row, image_id in enumerate(opened.annotations.image_ids)}
    for batch in batches(opened, show):
        for i, score in enumerate(MAPS[of](opened, batch)):
            inside = foreground(_boxes(batch, i), _size(batch, i))
            if inside.any() and not inside.all():
                yield Example(rows[batch.image_ids[i]], picture(batch, i), score), inside


@torch.no_grad()
def _of_encoder(opened: OpenedSplit, batch: Batch) -> Iterator[Tensor]:
    memory = opened.model.detector.encode(batch.images)
    check_finite(opened, memory.tokens)
    for i, norms in enumerate(memory.tokens.norm(dim=-1)):
        yield feature_score(levels(norms, memory, i), _size(batch, i))


@torch.no_grad()
def _of_attention(opened: OpenedSplit, batch: Batch) -> Iterator[Tensor]:
    """Of the main queries that are matched to a box in the last layer, one a box."""
    detector, targets = opened.model.detector, batch.targets
    memory = detector.encode(batch.images)
    output, attentions = decoded(detector, memory)
    check_finite(opened, output.logits, output.boxes)
    found = one_to_one(build_supervision(opened.model.recipe), output.map(lambda t: t[-1:]), targets)
    chosen = output.boxes.new_zeros(output.boxes.shape[1:3])
    chosen[found.image, found.query] = 1
    layers = [token_weights(*layer, chosen) for layer in attentions]
    for i, own in enumerate(torch.stack(layers).sum(0)):
        yield attention_score(levels(own, memory, i), _size(batch, i))


MAPS: dict[Of, Callable[[OpenedSplit, Batch], Iterable[Tensor]]] = {"encoder": _of_encoder, "attention": _of_attention}


def levels(values: Tensor, memory: Memory, image: int) -> list[Tensor]:
    """One number a token of an image, `(S,)`, as a map `(h, w)` a level without its padding."""
    sizes = [height * width for height, width in memory.shapes]
    maps = [part.view(shape) for part, shape in zip(values.split(sizes), memory.shapes, strict=True)]
    if memory.padding is None:
        return maps
    masks = memory.padding[image].split(sizes)
    inside = [~mask.view(shape) for mask, shape in zip(masks, memory.shapes, strict=True)]
    return [m[: int(own[:, 0].sum()), : int(own[0].sum())] for m, own in zip(maps, inside, strict=True)]


def _size(batch: Batch, image: int) -> Size:
    """Of an image without its padding."""
    height, width = image_sizes(batch.images)[image].tolist()
    return height, width


def _boxes(batch: Batch, image: int) -> Tensor:
    """An image's boxes `(n, 4)`, pixel `xyxy` in the image without its padding."""
    height, width = _size(batch, image)
    boxes = cxcywh_to_xyxy(batch.targets.boxes.split(batch.targets.sizes)[image])
    return boxes * boxes.new_tensor([width, height, width, height])
