"""Co-DETR, Fig. 7: do the queries that come from a branch's positives lie where the detector's own do?

A box's distance to the detector's queries is measured from the branch's positive queries for it: the mean to the main
query that is matched to the box, and the mean to all main queries that are matched to none. A query's place is the
centre of the box that it begins with: of an anchor, a region or a proposal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from detrellis.analysis.collaborative import assigned, check_alone, check_collaborative, decoded
from detrellis.analysis.figures import OfRun, Result, sheet
from detrellis.analysis.outputs import batches, check_finite, each_run, one_to_one, split_name
from detrellis.analysis.pictures import Picture, picture
from detrellis.analysis.schemes import begin, load_trained
from detrellis.arguments import checked
from detrellis.data.loader import Batch
from detrellis.engine.console import number
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.schemes.collaborative.coder import centres
from detrellis.schemes.collaborative.scene import Found
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.training import TrainableDetector

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

ALL = "all"  # what reports call the positives of all branches together


class Places(NamedTuple):
    """Where the queries of one image are, in shares of its width and height; on the host, in float64."""

    main: Tensor  # (N, 2)
    matched: Tensor  # (n,) the main query that is matched to each box, or -1
    positives: dict[str, tuple[Tensor, Tensor]]  # of each branch: (P, 2), and (P,) the box that each learns

    @property
    def branches(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The positives of each, and where there are several, of all together."""
        if len(self.positives) == 1:
            return self.positives
        places, owner = (torch.cat(parts) for parts in zip(*self.positives.values(), strict=True))
        return self.positives | {ALL: (places, owner)}


class Apart(NamedTuple):
    """Distances of each of an image's boxes `(n,)`; not a number where there is no such pair of queries."""

    matched: Tensor
    unmatched: Tensor
    positives: Tensor  # how many a box has


def distances(places: Places, positives: Tensor, owner: Tensor) -> Apart:
    """Means over each box's positives: `(P, 2)`, and `(P,)` the box that each learns."""
    main, matched = places.main, places.matched
    apart = torch.cdist(positives, main, compute_mode="donot_use_mm_for_euclid_dist")  # (P, N)
    free = torch.ones(len(main), dtype=torch.bool)
    free[matched[matched >= 0]] = False
    own = matched[owner]
    own_query = apart.gather(1, own.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill(own < 0, torch.nan)
    count = torch.bincount(owner, minlength=len(matched))
    near, far = (apart.new_zeros(len(matched)).index_add(0, owner, v) for v in (own_query, apart[:, free].mean(1)))
    return Apart(near / count, far / count, count)


class Example(NamedTuple):
    """An image to be drawn with its queries."""

    picture: Picture
    places: Places


@dataclass(frozen=True)
class Distances:
    """Of one branch, or of all: means over boxes. None where there is nothing to average."""

    matched: float | None  # from positive queries to the main query that is matched to their box
    unmatched: float | None  # from them to the main queries that are matched to no box
    counted: int  # boxes with positive queries and a matched query
    positives: float | None  # positive queries a box, of all boxes


def averaged(images: Iterable[Apart]) -> Distances:
    """Over all boxes of all images."""
    parts = list(images)
    matched, unmatched, count = (torch.cat(values).double() for values in zip(*parts, strict=True))
    means = [float(v.nanmean()) if v.isfinite().any() else None for v in (matched, unmatched, count)]
    return Distances(means[0], means[1], int(matched.isfinite().sum()), means[2])


@dataclass(frozen=True)
class Measured(OfRun):
    """One run."""

    images: int
    boxes: int
    branches: dict[str, Distances]  # and `ALL`, where there are several
    example: Example | None  # the first image where every branch has a positive query for a box that is matched

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; the example is in the figure only."""
        named = {k: getattr(self, k) for k in ("name", "run", "data", "images", "boxes")}
        return named | {"branches": {branch: asdict(found) for branch, found in self.branches.items()}}


@dataclass(frozen=True)
class Comparison(Result):
    """Several runs, measured in the same way."""

    name = "query_distance"

    split: str
    runs: tuple[Measured, ...]

    def settings(self) -> dict[str, Any]:
        """What it was measured with."""
        return {"split": self.split}

    def table(self) -> Table:
        """For each run, a row for each branch, for a rich console."""
        from rich.text import Text

        caption = (
            "From a branch's positive queries for a box to the main query that is matched to the box, and to those "
            "that are matched to none; in shares of the image's width and height, means over boxes."
        )
        table = sheet("Distance of the branches' queries from the detector's own (Co-DETR, Fig. 7)", caption)
        table.add_column("branch", no_wrap=True)
        for column in ("boxes", "counted", "positives\na box", "to\nmatched", "to\nunmatched"):
            table.add_column(column, justify="right", no_wrap=True)
        for run in self.runs:
            for i, (branch, found) in enumerate(run.branches.items()):
                own = (run.name, str(run.boxes)) if i == 0 else ("", "")
                each = "-" if found.positives is None else f"{found.positives:.1f}"
                row = (branch, own[1], str(found.counted), each, number(found.matched), number(found.unmatched))
                # Text: a run may be called "[bold]"
                table.add_row(Text(own[0]), *row, end_section=i == len(run.branches) - 1)
        return table

    def figure(self) -> Figure:
        """Bars, and the queries of one image a run. Raises `UserError` where matplotlib is missing."""
        from detrellis.analysis.query_distance_figure import draw

        return draw(self)


@checked
def analyze(
    runs: str | Path | Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    device: str | None = None,
    progress: bool = False,
    **on: Unpack[EvalOptions],
) -> Comparison:
    """Measure one run or several, each on its own validation split or on what `on` says (see `engine/evaluate.py`).

    `names` are what the runs are called (default: their folders). Raises `UserError` for a run without branches or
    without its `last.state.pt`, for queries without a place, and under torchrun.
    """
    measured = each_run(runs, names, device, progress, on, _measure, check_collaborative)
    return Comparison(split_name(on), measured)


def _measure(opened: OpenedSplit, name: str, show: bool) -> Measured:
    check_alone()
    found: list[dict[str, Apart]] = []
    example = None
    model, co = load_trained(opened, Collaborative)
    for batch in batches(opened, show):
        for i, places in enumerate(query_places(opened, model, co, batch)):
            found.append({branch: distances(places, *own) for branch, own in places.branches.items()})
            drawable = example is None and all(a.matched.isfinite().any() for a in found[-1].values())
            example = Example(picture(batch, i), places) if drawable else example
    branches = {branch: averaged(image[branch] for image in found) for branch in found[0]}
    boxes = sum(len(next(iter(image.values())).positives) for image in found)
    return Measured(name, opened.run, opened.files, len(found), boxes, branches, example)


@torch.no_grad()
def query_places(opened: OpenedSplit, model: TrainableDetector, co: Collaborative, batch: Batch) -> list[Places]:
    """Of each image of a batch. Raises `UserError` where the main queries have no place."""
    step = begin(model, batch, model.detector.encode(batch.images))
    if step.queries.boxes is None:
        remedy = "Measure detectors whose queries are boxes or points, such as tiny or conditional-detr-r50."
        raise UserError(f"{opened.run}: its queries have no place", remedy)
    output = decoded(step).map(lambda t: t[-1:])
    check_finite(opened, output.logits, output.boxes)
    pairs = one_to_one(step.supervision, output, step.targets)
    matched = torch.full_like(step.targets.labels, -1).index_copy(0, pairs.target, pairs.query)
    main = step.queries.boxes[..., :2].cpu().double()
    scene, found = assigned(co, step)
    positives = {branch: _positives(own, scene.sizes) for branch, own in found.items()}
    images = zip(main, matched.cpu().split(step.targets.sizes), strict=True)
    return [Places(*own, {b: p[i] for b, p in positives.items()}) for i, own in enumerate(images)]


def _positives(found: Sequence[Found], sizes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Centres and boxes of the positives in each image, as `Places` has them."""
    kept = [(f.boxes[f.owner >= 0], f.owner[f.owner >= 0]) for f in found]
    return [((centres(b) / size.flip(-1)).cpu().double(), o.cpu()) for (b, o), size in zip(kept, sizes, strict=True)]
