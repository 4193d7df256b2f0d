"""Co-DETR, Fig. 7: do the queries that come from a branch's positives lie where the detector's own
do?

A box's distance to the detector's queries is measured from the branch's positive queries for it:
the mean to the main query that is matched to the box, and the mean to all main queries that are
matched to none. A query's place is the centre of the box that it begins with: of an anchor, a
region or a proposal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from detrellis.analysis.figures import (
    BLUE,
    FAINT,
    INK,
    Axes,
    Figure,
    canvas,
    colours,
    heading,
    headline,
    tidy,
    value_bars,
)
from detrellis.analysis.outputs import batches, check_finite, last_layer, one_to_one
from detrellis.analysis.pictures import Picture, outline, picture
from detrellis.analysis.runs import (
    ComparedRuns,
    Result,
    RunResult,
    add_run,
    mean_or_none,
    run_table,
)
from detrellis.analysis.schemes import (
    begin,
    branch_assignments,
    check_alone,
    check_collaborative,
    decode_main,
    load_with_scheme,
)
from detrellis.arguments import checked
from detrellis.data.batch import Batch
from detrellis.engine.console import number
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.schemes.collaborative.coder import centres
from detrellis.schemes.collaborative.scene import BranchAssignment
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.training import TrainableDetector

ALL = "all"  # what reports call the positives of all branches together


class Positives(NamedTuple):
    """A branch's positive queries in one image."""

    centres: Tensor  # (P, 2)
    owner: Tensor  # (P,) the box that each learns


class QueryPlaces(NamedTuple):
    """Where the queries of one image are, as fractions of its width and height;
    on the host, in float64.
    """

    main: Tensor  # (N, 2)
    matched: Tensor  # (n,) the main query that is matched to each box, or -1
    positives: dict[str, Positives]  # of each branch

    @property
    def branches(self) -> dict[str, Positives]:
        """The positives of each, and where there are several, of all together."""
        if len(self.positives) == 1:
            return self.positives
        columns = zip(*self.positives.values(), strict=True)
        return self.positives | {ALL: Positives(*(torch.cat(parts) for parts in columns))}


class BoxDistances(NamedTuple):
    """Distances of each of an image's boxes `(n,)`; NaN where there is no such pair of queries."""

    matched: Tensor
    unmatched: Tensor
    positives: Tensor  # how many a box has


def distances(places: QueryPlaces, positives: Positives) -> BoxDistances:
    """The means over each box's positives."""
    main, matched = places.main, places.matched
    # (P, N)
    apart = torch.cdist(positives.centres, main, compute_mode="donot_use_mm_for_euclid_dist")

    # From each positive: to the query that is matched to its box, and to the queries that are
    # matched to none.
    query = matched[positives.owner]
    near = (
        apart.gather(1, query.clamp(min=0).unsqueeze(1))
        .squeeze(1)
        .masked_fill(query < 0, torch.nan)
    )
    free = torch.ones(len(main), dtype=torch.bool)
    free[matched[matched >= 0]] = False
    far = apart[:, free].mean(1)

    # Then by box.
    count = torch.bincount(positives.owner, minlength=len(matched))
    sums = [
        apart.new_zeros(len(matched)).index_add(0, positives.owner, values)
        for values in (near, far)
    ]
    return BoxDistances(sums[0] / count, sums[1] / count, count)


class PlacedImage(NamedTuple):
    """An image to be drawn with its queries."""

    picture: Picture
    places: QueryPlaces


@dataclass(frozen=True)
class MeanDistances:
    """Means over boxes, for one branch or for all. None where there is nothing to average."""

    matched: float | None  # from positive queries to the main query that is matched to their box
    unmatched: float | None  # from them to the main queries that are matched to no box
    counted: int  # boxes with positive queries and a matched query
    positives: float | None  # positive queries a box, of all boxes


def averaged(images: Iterable[BoxDistances]) -> MeanDistances:
    """The means over all boxes of all images."""
    matched, unmatched, count = (torch.cat(values) for values in zip(*images, strict=True))
    counted = int(matched.isfinite().sum())
    return MeanDistances(
        mean_or_none(matched), mean_or_none(unmatched), counted, mean_or_none(count)
    )


@dataclass(frozen=True)
class RunQueryDistance(RunResult):
    """How far the branches' queries of one run are from the detector's own."""

    images: int
    boxes: int
    branches: dict[str, MeanDistances]  # and `ALL`, where there are several
    # The first image where every branch has a positive query for a box that is matched
    example: PlacedImage | None


@dataclass(frozen=True)
class QueryDistanceResult(Result):
    """How far the branches' queries of several runs are from the detector's own."""

    name = "query_distance"
    runs: tuple[RunQueryDistance, ...]
    split: str

    def table(self) -> Table:
        """For each run, a row for each branch, for a rich console."""
        caption = (
            "From a branch's positive queries for a box to the main query that is matched to "
            "the box, and to those that are matched to none; in shares of the image's width and "
            "height, means over boxes."
        )
        columns = ("branch", "boxes", "counted", "positives\na box", "to\nmatched", "to\nunmatched")
        title = "Distance of the branches' queries from the detector's own (Co-DETR, Fig. 7)"
        table = run_table(title, caption, *columns, left=("branch",))
        for run in self.runs:
            for i, (branch, means) in enumerate(run.branches.items()):
                name, boxes = (run.name, str(run.boxes)) if i == 0 else ("", "")
                values = [
                    number(means.positives, ".1f"),
                    number(means.matched),
                    number(means.unmatched),
                ]
                last = i == len(run.branches) - 1
                add_run(table, name, branch, boxes, str(means.counted), *values, end_section=last)
        return table


@checked
def analyze(runs: ComparedRuns) -> QueryDistanceResult:
    """Measure how far the branches' positive queries are from the detector's own.

    Raises `UserError` for a run without branches or without its `last.state.pt`, for queries
    without a place, and under torchrun.
    """
    return QueryDistanceResult(runs.measure(_measure, check_collaborative), runs.split)


def _measure(opened: OpenedSplit, name: str, show: bool) -> RunQueryDistance:
    check_alone()
    images: list[dict[str, BoxDistances]] = []  # by branch
    example = None
    model, co = load_with_scheme(opened, Collaborative)
    for batch in batches(opened, show):
        for i, places in enumerate(query_places(opened, model, co, batch)):
            image = {
                branch: distances(places, positives)
                for branch, positives in places.branches.items()
            }
            images.append(image)
            if example is None and all(d.matched.isfinite().any() for d in image.values()):
                example = PlacedImage(picture(batch, i, opened.model.normalise), places)
    branches = {branch: averaged(image[branch] for image in images) for branch in images[0]}
    boxes = sum(len(next(iter(image.values())).positives) for image in images)
    return RunQueryDistance(name, opened.run, opened.files, len(images), boxes, branches, example)


@torch.no_grad()
def query_places(
    opened: OpenedSplit, model: TrainableDetector, co: Collaborative, batch: Batch
) -> list[QueryPlaces]:
    """Where the queries of each image of a batch are.
    Raises `UserError` where the main queries have no place.
    """
    step = begin(model, batch)
    if step.queries.boxes is None:
        remedy = (
            "Measure detectors whose queries are boxes or points, such as tiny or "
            "conditional-detr-r50."
        )
        raise UserError(f"{opened.run}: its queries have no place", remedy)

    # Main queries, and which of them is matched to each box.
    output = last_layer(decode_main(step))
    check_finite(opened, output.logits, output.boxes)
    pairs = one_to_one(step.supervision, output, step.targets)
    matched = torch.full_like(step.targets.labels, -1).index_copy(0, pairs.target, pairs.query)
    main = step.queries.boxes[..., :2].cpu().double()

    scene, assignments = branch_assignments(co, step)
    positives = {branch: _positives(found, scene.sizes) for branch, found in assignments.items()}
    places = []
    for i, image_matched in enumerate(matched.cpu().split(step.targets.sizes)):
        places.append(
            QueryPlaces(main[i], image_matched, {branch: p[i] for branch, p in positives.items()})
        )
    return places


def _positives(assigned: BranchAssignment, sizes: Tensor) -> list[Positives]:
    """The positives of each image; `sizes (B, 2)` are their heights and widths in pixels."""
    positives = []
    for boxes, owner, size in zip(assigned.boxes, assigned.owner, sizes, strict=True):
        places = centres(boxes[owner >= 0]) / size.flip(-1)
        positives.append(Positives(places.cpu().double(), owner[owner >= 0].cpu()))
    return positives


# The figure
PANEL, HEIGHT = (4.2, 6.4), 4.4  # inches: width of the bars and of a picture; height of a run
MATCHED, UNMATCHED = BLUE, FAINT  # the detector's own queries
MARKERS = "x+1234|"  # of the branches' queries: they may lie on each other


def draw(result: QueryDistanceResult) -> Figure:
    """A row a run: Fig. 7b, on one scale, and Fig.
    7a. Raises `UserError` where matplotlib is missing.
    """
    runs = result.runs
    figure = canvas(
        sum(PANEL),
        HEIGHT * len(runs) + 0.5,
        "Distance of the branches' queries from the detector's",
    )
    grid = figure.subplots(len(runs), 2, width_ratios=PANEL, squeeze=False)
    means = [mean for run in runs for mean in run.branches.values()]
    highest = max(value or 0 for mean in means for value in (mean.matched, mean.unmatched)) or 1
    for run, (left, right) in zip(runs, grid, strict=True):
        _bars(left, run, highest)
        if run.example is None:
            right.set_axis_off()
        else:
            _queries(right, run.example)
    return figure


def _bars(axes: Axes, run: RunQueryDistance, highest: float) -> None:
    tidy(axes)
    places = np.arange(len(run.branches))
    parts = list(run.branches.values())
    for shift, colour, label, values in (
        (-0.2, MATCHED, "to the matched query", [p.matched for p in parts]),
        (0.2, UNMATCHED, "to unmatched queries", [p.unmatched for p in parts]),
    ):
        value_bars(axes, places + shift, values, 0.37, color=colour, label=label)
    axes.set_xticks(places, list(run.branches), rotation=45 if len(parts) > 4 else 0)
    axes.set_xlim(-0.6, len(parts) - 0.4)
    axes.set_ylim(0, 1.3 * highest)
    axes.set_ylabel("distance, share of the image", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    headline(axes, run.name, f"mean of {max(p.counted for p in parts):,} boxes")


def _queries(axes: Axes, example: PlacedImage) -> None:
    picture, places = example
    height, width = picture.pixels.shape[:2]
    axes.imshow(picture.pixels, alpha=0.45)
    outline(axes, picture, INK)
    size = np.array([width, height])
    matched = places.matched[places.matched >= 0]
    free = np.delete(places.main.numpy(), matched.numpy(), axis=0)
    groups = [("main, unmatched", free, UNMATCHED, ".", 18)]
    _, *others = colours(len(places.positives) + 1)
    for i, (branch, positives) in enumerate(places.positives.items()):
        groups.append(
            (
                f"{branch}, positive",
                positives.centres.numpy(),
                others[i],
                MARKERS[i % len(MARKERS)],
                22,
            )
        )
    groups.append(("main, matched", places.main[matched].numpy(), MATCHED, "o", 26))
    for label, points, colour, marker, area in groups:
        x, y = (points * size - 0.5).T
        axes.scatter(x, y, s=area, c=colour, marker=marker, linewidths=0.9, label=label)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    heading(axes, "centres of queries in one image")
