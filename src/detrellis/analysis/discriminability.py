"""Co-DETR, Eq. 7 and 8: how well the encoder's features,
or the decoder's attention, tell objects from background.

A map of scores D in [0, 1] over the pixels of an image, as the detector sees it (resized, without
padding):

* of the encoder: each level's norm over channels, resized to the image and divided by its maximum;
  mean over levels;
* of attention, which the paper leaves open: what the queries that are matched to a box attend to,
  mean over heads, layers and these queries; a token's weight is spread over the pixels that it
  stands for; divided by the maximum.

A pixel is foreground if its centre is strictly inside a box that is not a crowd region. IoF(S) and
IoB(S) are the fractions of the foreground and of the background with D > S: the curve of the one
over the other is a ROC curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from detrellis.analysis.attention_maps import decode_recorded, token_weights
from detrellis.analysis.figures import (
    FAINT,
    Axes,
    Figure,
    as_written,
    canvas,
    colours,
    heading,
    shortened,
    tidy,
)
from detrellis.analysis.outputs import (
    annotation_rows,
    batches,
    check_finite,
    last_layer,
    one_to_one,
)
from detrellis.analysis.pictures import (
    SMALLEST,
    Picture,
    Size,
    attention_score,
    image_boxes,
    image_size,
    levels,
    outline,
    picture,
    resized,
)
from detrellis.analysis.runs import ComparedRuns, Result, RunResult, add_run, run_table
from detrellis.arguments import Images, checked
from detrellis.data.batch import Batch
from detrellis.distributed import all_gather
from detrellis.engine.console import number
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.recipes.build import build_supervision

# S goes from 0 to 1 in this many steps. The paper does not say how many it takes; few would do for
# attention, but norms behind a LayerNorm are nearly equal, and D may lie between 0.998 and 1.
STEPS = 2**16
POINTS = 100  # of a curve that are drawn and written
IMAGES = 4  # with their maps in the figure

Of = Literal["encoder", "attention"]


def feature_score(norms: Sequence[Tensor], size: Size) -> Tensor:
    """Eq. 7: D `(H, W)` from each level's norms over channels `(h, w)`,
    none of which is padding.
    """
    maps = [resized(level, size) for level in norms]
    return torch.stack([m / m.max().clamp(min=SMALLEST) for m in maps]).mean(0)


def foreground(boxes: Tensor, size: Size) -> Tensor:
    """`(H, W)` bool: pixels whose centre is strictly inside one of `boxes (n, 4)`, pixel `xyxy`."""
    y, x = (torch.arange(n, dtype=boxes.dtype, device=boxes.device) + 0.5 for n in size)
    x1, y1, x2, y2 = boxes.T[..., None]  # (n, 1) each
    rows, columns = (y > y1) & (y < y2), (x > x1) & (x < x2)
    boxes_around: Tensor = rows.T.float() @ columns.float()
    return boxes_around > 0


def fractions_above(score: Tensor, where: Tensor, thresholds: Tensor) -> Tensor:
    """Eq. 8: what fraction of the pixels `where (H, W)` has a `score (H, W)` above each of the
    `thresholds (K,)`: `(K,)` in float64, NaN where there is no such pixel."""
    inside = score[where].sort().values
    return 1 - torch.searchsorted(inside, thresholds.to(inside), right=True).double() / len(inside)


@dataclass(frozen=True)
class Curve:
    """IoF over IoB, in the order of rising thresholds."""

    thresholds: tuple[float, ...]
    iof: tuple[float, ...]
    iob: tuple[float, ...]
    # Under the curve of all thresholds: 0.5 for a map that knows nothing, 1 for one that knows all
    area: float

    @classmethod
    def of(cls, thresholds: Tensor, fractions: Tensor, points: int = POINTS) -> Curve:
        """From IoF and IoB `(2, K)` at each of `thresholds (K,)`; about `points` of them are kept.

        The curve is continued to (1, 1) for the area: pixels of score 0 are above no threshold.
        """
        iof, iob = torch.cat(
            [fractions.new_ones(2, 1), fractions, fractions.new_zeros(2, 1)], dim=1
        )
        area = -float(torch.trapezoid(iof, iob))

        # Points at even distances along the way from (1, 1) to (0, 0), which never turns back.
        way = 1 - fractions.mean(0)
        marks = torch.linspace(float(way[0]), float(way[-1]), points + 1, dtype=way.dtype)
        kept = torch.searchsorted(way, marks).clamp(max=len(way) - 1).unique()
        drawn = [tuple(t[kept].tolist()) for t in (thresholds, *fractions)]
        return cls(drawn[0], drawn[1], drawn[2], area)


class ScoredImage(NamedTuple):
    """An image to be drawn with its map."""

    row: int  # its place in the annotations
    picture: Picture
    score: Tensor  # (H, W)


@dataclass(frozen=True)
class RunDiscriminability(RunResult):
    """One run. The curve is the mean over the images that have both foreground and background."""

    images: int
    skipped: int  # images without foreground or without background
    curve: Curve
    examples: tuple[ScoredImage, ...]


@dataclass(frozen=True)
class DiscriminabilityResult(Result):
    """The discriminability of several runs."""

    name = "discriminability"
    runs: tuple[RunDiscriminability, ...]
    of: Of
    split: str
    steps: int = STEPS

    def table(self) -> Table:
        caption = (
            "Area under the curve of IoF over IoB (shares of foreground and background above a "
            "threshold), means over images: 0.5 is chance. Images without a box, or that boxes "
            "cover, are left out."
        )
        table = run_table(
            f"Discriminability of the {self.of} (Co-DETR)", caption, "images", "left out", "area"
        )
        for run in self.runs:
            add_run(table, run.name, str(run.images), str(run.skipped), number(run.curve.area))
        return table


@checked
def analyze(
    runs: ComparedRuns, *, of: Of = "encoder", images: Images = IMAGES
) -> DiscriminabilityResult:
    """Measure how well maps tell objects from background.

    `of` is what the maps are of, `images` how many the figure shows. Raises `UserError` where no
    image has both foreground and background.
    """
    return DiscriminabilityResult(runs.measure(partial(_measure, of, images)), of, runs.split)


def _measure(
    of: Of, images: int, opened: OpenedSplit, name: str, show: bool
) -> RunDiscriminability:
    thresholds = torch.arange(STEPS + 1) / STEPS
    # IoF and IoB, summed over images
    total, count = torch.zeros(2, STEPS + 1, dtype=torch.float64), 0
    examples: list[ScoredImage] = []
    for example, inside in _scored(opened, of, show):
        total += torch.stack(
            [fractions_above(example.score, part, thresholds) for part in (inside, ~inside)]
        ).cpu()
        count += 1
        if len(examples) < images:
            examples.append(example._replace(score=example.score.cpu()))

    # From here on of all processes.
    totals, counts, drawn = zip(*all_gather((total, count, examples)), strict=True)
    measured = sum(counts)
    if not measured:
        where = f"{opened.files}: no image with both foreground and background"
        raise UserError(where, "Take another --split or --data.")
    curve = Curve.of(thresholds, torch.stack(totals).sum(0) / measured)
    first = sorted((example for part in drawn for example in part), key=lambda e: e.row)[:images]
    skipped = len(opened.annotations) - measured
    return RunDiscriminability(
        name, opened.run, opened.files, measured, skipped, curve, tuple(first)
    )


def _scored(opened: OpenedSplit, of: Of, show: bool) -> Iterator[tuple[ScoredImage, Tensor]]:
    """Every image of this process that has both foreground `(H, W)`,
    given beside it, and background.
    """
    rows = annotation_rows(opened)
    for batch in batches(opened, show):
        for i, score in enumerate(MAPS[of](opened, batch)):
            inside = foreground(image_boxes(batch, i), image_size(batch, i))
            if inside.any() and not inside.all():
                yield (
                    ScoredImage(
                        rows[batch.image_ids[i]], picture(batch, i, opened.model.normalise), score
                    ),
                    inside,
                )


@torch.no_grad()
def _of_encoder(opened: OpenedSplit, batch: Batch) -> Iterator[Tensor]:
    memory = opened.model.detector.encode(batch.images)
    check_finite(opened, memory.tokens)
    for i, norms in enumerate(memory.tokens.norm(dim=-1)):
        yield feature_score(levels(norms, memory, i), image_size(batch, i))


@torch.no_grad()
def _of_attention(opened: OpenedSplit, batch: Batch) -> Iterator[Tensor]:
    """Of the main queries that are matched to a box in the last layer, one a box."""
    detector, targets = opened.model.detector, batch.targets
    memory = detector.encode(batch.images)
    output, attentions = decode_recorded(detector, memory)
    check_finite(opened, output.logits, output.boxes)
    matched = one_to_one(build_supervision(opened.model.recipe), last_layer(output), targets)
    chosen = output.boxes.new_zeros(output.boxes.shape[1:3])
    chosen[matched.image, matched.query] = 1
    layers = [token_weights(*attention, chosen) for attention in attentions]
    for i, weights in enumerate(torch.stack(layers).sum(0)):
        yield attention_score(levels(weights, memory, i), image_size(batch, i))


MAPS: dict[Of, Callable[[OpenedSplit, Batch], Iterable[Tensor]]] = {
    "encoder": _of_encoder,
    "attention": _of_attention,
}


# The figure
CURVES, CELL = 5.2, (2.3, 1.95)  # inches: of the curves, and of one picture
EDGE = "#2EE6E6"  # of boxes: seen on all colours of the maps


def draw(result: DiscriminabilityResult) -> Figure:
    """The curves, and a column an image with each run's map.
    Raises `UserError` where matplotlib is missing.
    """
    shown = max((len(run.examples) for run in result.runs), default=0)
    rows = _rows(result.runs) if shown else []
    height = max(CURVES, CELL[1] * len(rows) + 0.6)
    figure = canvas(CURVES + CELL[0] * shown, height, f"Discriminability of the {result.of}")
    if not shown:
        _curves(figure.subplots(), result.runs)
        return figure
    left, right = (
        figure.subfigures(1, 2, width_ratios=[CURVES, CELL[0] * shown], squeeze=False)
        .flatten()
        .tolist()
    )
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
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
        anchor="N",
        xlabel="IoB, share of the background above S",
    )
    axes.set_ylabel("IoF, share of the foreground above S")
    below = (0.0, -0.14)  # of the axes, within which the curves of weak encoders would cross it
    title = "area under the curve"
    as_written(
        axes.legend(
            fontsize=9,
            frameon=False,
            loc="upper left",
            bbox_to_anchor=below,
            title=title,
            title_fontsize=9,
        )
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
    axes.text(
        0.5, -0.03, text, fontsize=8, color=FAINT, ha="center", va="top", transform=axes.transAxes
    )
