"""Group DETR, Fig. 3 and 4: where the groups' queries are, how far apart, and how alike the groups perform.

All on the run's last checkpoint, all groups in one pass (`all_groups.py`):

* positions: centres of the queries' reference points, anchors or proposals; and the distance of the groups' 2-D
  histograms, which the paper judges by eye: total variation, averaged over pairs of groups;
* PD and MD (Eq. 6 and 7), averaged over pairs of groups; and as logged in training, where they were;
* AP of each group by itself;
* the first group's instability IS from decoder layer to decoder layer (`instability.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from detrellis.analysis.all_groups import AllGroups, all_groups, check_grouped, load_groups
from detrellis.analysis.figures import OfRun, Result, sheet
from detrellis.analysis.instability import instability, matched_boxes
from detrellis.analysis.outputs import (
    batches,
    check_finite,
    each_run,
    one_to_one,
    split_name,
)
from detrellis.arguments import Cells, checked
from detrellis.data.loader import Batch
from detrellis.distributed import all_gather
from detrellis.engine.coco_eval import CocoEvaluator, EvalResult
from detrellis.engine.console import number
from detrellis.engine.evaluate import EvalOptions, completed
from detrellis.engine.log import read_records
from detrellis.loading import OpenedSplit
from detrellis.schemes.distances import matched_distance, matched_positions, position_distance
from detrellis.training import TrainableDetector

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

GRID = 8  # cells of a histogram on each side
SHUFFLES = 10  # random groups that the histogram distance is compared with


def histograms(positions: Tensor, grid: int = GRID) -> Tensor:
    """Shares of each group's positions by cell, row by row from the top: `(..., K, N, 2)` to `(..., K, grid^2)`."""
    column, row = (positions * grid).long().clamp(0, grid - 1).unbind(-1)
    cells = torch.nn.functional.one_hot(row * grid + column, grid**2)
    return cells.double().mean(-2)


def total_variation(shares: Tensor) -> Tensor:
    """Half the L1 distance of the distributions of each pair of groups: `(..., K, G)` to `(..., P)`, 0 to 1."""
    first, second = torch.triu_indices(shares.shape[-2], shares.shape[-2], 1, device=shares.device)
    return (shares[..., first, :] - shares[..., second, :]).abs().sum(-1) / 2


def dealt(positions: Tensor, shuffles: int = SHUFFLES) -> Tensor:
    """The same positions, dealt to groups at random: `(..., K, N, 2)` to `(shuffles, ..., K, N, 2)`."""
    generator = torch.Generator().manual_seed(0)
    groups, count = positions.shape[-3:-1]
    orders = (torch.randperm(groups * count, generator=generator).to(positions.device) for _ in range(shuffles))
    return torch.stack([positions.flatten(-3, -2)[..., o, :].unflatten(-2, (groups, count)) for o in orders])


class Places(NamedTuple):
    """Where the queries of some images are; or of one, where they are the same in all."""

    first: Tensor  # (K, N, 2) positions in the first image
    shares: Tensor  # (n, K, grid^2) histograms
    distance: Tensor  # (n,) of the histograms: mean over pairs
    random: Tensor  # (n,) the same for random groups
    pd: Tensor  # (n,) mean over pairs

    @classmethod
    def of(cls, positions: Tensor, grid: int) -> Places:
        """From `(n, K, N, 2)`."""
        shares = histograms(positions, grid)
        random = total_variation(histograms(dealt(positions), grid)).mean((0, -1))
        pd = position_distance(positions).mean(-1)
        found = (positions[0], shares, total_variation(shares).mean(-1), random, pd)
        return cls(*(t.cpu() for t in found))

    @classmethod
    def joined(cls, parts: Sequence[Places]) -> Places:
        """Of several batches."""
        columns = list(zip(*parts, strict=True))
        return cls(columns[0][0], *(torch.cat(c) for c in columns[1:]))


class Found(NamedTuple):
    """One batch, on the host."""

    places: Places | None  # None: no places, or those of an earlier batch
    matched: Tensor | None  # (K, T, 2) positions of each group's queries for each box
    v: list[Tensor]  # of each image, (L, N): what the first group's queries are matched to


@dataclass(frozen=True)
class Logged:
    """An epoch of the training log; means over its steps."""

    epoch: int
    pd: float | None
    md: float | None


@dataclass(frozen=True)
class Measured(OfRun):
    """One run. What needs places is None where the queries have none, and `md` where there is no box."""

    images: int
    boxes: int
    groups: int
    queries: int  # of one group
    fixed: bool  # whether the queries are at the same places in every image
    positions: tuple[tuple[tuple[float, float], ...], ...] | None  # by group, in one image
    shares: tuple[tuple[float, ...], ...] | None  # by group: its histogram, mean over images
    distance: float | None  # total variation of two groups' histograms in an image; mean over pairs and images
    random: float | None  # the same for the positions dealt to groups at random
    pd: float | None
    md: float | None
    instability: tuple[float, ...]  # IS of the first group at each layer but the first
    scores: tuple[EvalResult, ...]  # by group
    log: tuple[Logged, ...]  # empty where the run did not log distances

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        scores = [dict(s.stats) for s in self.scores]
        nested = {k: [list(map(_listed, group)) for group in v] for k in ("positions", "shares") if (v := plain[k])}
        return plain | nested | {"scores": scores, "log": [vars(x) for x in self.log]}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Comparison(Result):
    """Several runs, measured in the same way."""

    name = "groups"

    grid: int
    split: str
    runs: tuple[Measured, ...]

    def settings(self) -> dict[str, Any]:
        """What it was measured with."""
        return {"grid": self.grid, "split": self.split, "shuffles": SHUFFLES}

    def table(self) -> Table:
        """For each run, a row for all groups and one for each, for a rich console."""
        from rich.text import Text

        caption = (
            "PD: from a query to the nearest one of another group. MD: between two groups' queries for the same box. "
            "TV: distance of the groups' histograms of positions, and in brackets that of random groups. IS: queries "
            "of group 1 in an image that are matched anew, by decoder layer. AP of raw, not averaged, weights."
        )
        title = "Groups of queries (Group DETR)"
        table = sheet(title, caption)
        for column in ("group", "AP", "AP50", "PD", "MD", "TV", "IS"):
            table.add_column(column, justify="right", no_wrap=column != "IS")
        for run in self.runs:  # Text: a run may be called "[bold]"
            spread = f"{number(run.distance)} ({number(run.random)})" if run.fixed or run.pd is not None else "-"
            table.add_row(Text(run.name), f"all {run.groups}", "", "", number(run.pd), number(run.md), spread, "")
            for k, score in enumerate(run.scores):
                stats = [number(score.stats[name]) for name in ("AP", "AP50")]
                steps = " ".join(f"{x:.1f}" for x in run.instability) if k == 0 else ""
                table.add_row("", str(k + 1), *stats, "", "", "", steps, end_section=k == run.groups - 1)
        return table

    def figure(self) -> Figure:
        """Positions, their histograms, distances in training, IS and AP. Raises `UserError` without matplotlib."""
        from detrellis.analysis.groups_figure import draw

        return draw(self)


@checked
def analyze(
    runs: str | Path | Sequence[str | Path],
    *,
    grid: Cells = GRID,
    names: Sequence[str] | None = None,
    device: str | None = None,
    progress: bool = False,
    **on: Unpack[EvalOptions],
) -> Comparison:
    """Measure one run or several, each on its own validation split or on what `on` says (see `engine/evaluate.py`).

    `grid` is the number of cells on each side of a histogram, `names` what the runs are called (default: their
    folders). Raises `UserError` for a run without groups or without its `last.state.pt`.
    """
    measured = each_run(runs, names, device, progress, on, partial(_measure, grid), check_grouped)
    return Comparison(grid, split_name(on), measured)


def _measure(grid: int, opened: OpenedSplit, name: str, show: bool) -> Measured:
    model, group = load_groups(opened)
    evaluators = [CocoEvaluator(opened.annotations, top_k=model.detector.postprocess.top_k) for _ in range(group.k)]
    parts: list[Found] = []
    fixed = True
    for batch in batches(opened, show):
        seen = all_groups(model, group, batch)
        check_finite(opened, seen.output.logits[-1], seen.output.boxes[-1])
        fixed = seen.fixed
        wanted = not fixed or not parts  # places that never change are looked at once
        parts.append(_found(model, seen, batch, grid if wanted else None))
        _collect(evaluators, model, seen, batch)
    everywhere = [p for part in all_gather(parts) for p in part]
    scores = tuple(completed(e).compute() for e in evaluators)
    found = [p.places for p in everywhere if p.places is not None]
    return Measured(
        name=name,
        run=opened.run,
        data=opened.files,
        images=scores[0].images,
        boxes=scores[0].ground_truth,
        groups=group.k,
        queries=group.count,
        fixed=fixed,
        **_distances(found, [p.matched for p in everywhere if p.matched is not None]),
        instability=tuple(instability(v for p in everywhere for v in p.v).tolist()),
        scores=scores,
        log=_logged(opened),
    )


def _found(model: TrainableDetector, seen: AllGroups, batch: Batch, grid: int | None) -> Found:
    """`grid`: None where the places are known."""
    targets, supervision = batch.targets, model.supervision
    own = one_to_one(supervision, seen.of(0), targets)
    images = list(matched_boxes(own, targets, len(seen.output.logits), seen.queries).cpu().unbind(1))
    if seen.positions is None:
        return Found(None, None, images)
    last = one_to_one(supervision, seen.output.map(lambda t: t[-1:]), targets, seen.groups)
    matched = matched_positions(seen.positions, [last], len(targets.labels)).cpu()
    new = seen.positions[:1] if seen.fixed else seen.positions
    return Found(None if grid is None else Places.of(new, grid), matched, images)


def _collect(evaluators: Sequence[CocoEvaluator], model: TrainableDetector, seen: AllGroups, batch: Batch) -> None:
    for k, evaluator in enumerate(evaluators):
        evaluator.update(batch.image_ids, model.detector.postprocess(seen.of(k), batch.sizes))


def _distances(found: Sequence[Places], matched: Sequence[Tensor]) -> dict[str, Any]:
    """The fields of `Measured` about places."""
    if not found:
        return dict.fromkeys(("positions", "shares", "distance", "random", "pd", "md"))
    places = Places.joined(found)
    apart = matched_distance(torch.cat(list(matched), dim=1)).nanmean()
    return {
        "positions": tuple(tuple((round(x, 5), round(y, 5)) for x, y in group) for group in places.first.tolist()),
        "shares": tuple(map(tuple, places.shares.mean(0).tolist())),
        "distance": float(places.distance.mean()),
        "random": float(places.random.mean()),
        "pd": float(places.pd.double().mean()),
        "md": float(apart) if apart.isfinite() else None,
    }


def _logged(opened: OpenedSplit) -> tuple[Logged, ...]:
    file = Path(opened.run) / "metrics.jsonl"
    records = read_records(file) if file.is_file() else []
    epochs = [(r["epoch"], r["metrics"]) for r in records if r["kind"] == "epoch" and "group/md" in r["metrics"]]
    return tuple(Logged(epoch, m.get("group/pd"), m["group/md"]) for epoch, m in epochs)
