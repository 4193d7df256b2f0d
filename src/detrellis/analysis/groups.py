"""Group DETR, Fig. 3 and 4: where the groups' queries are, how far apart, and how alike the groups
perform.

All on the run's last checkpoint, all groups in one pass (`all_groups` in `schemes.py`):

* positions: centres of the queries' reference points, anchors or proposals; and the distance of the
  groups' 2-D histograms, which the paper compares by eye: total variation, averaged over pairs of
  groups;
* PD and MD (Eq. 6 and 7), averaged over pairs of groups; and as logged in training, where they
  were;
* AP of each group by itself;
* the first group's instability IS from decoder layer to decoder layer (`instability.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from detrellis.analysis.instability import instability, matched_boxes
from detrellis.analysis.outputs import batches, check_finite, kind_of_ap, last_layer, one_to_one
from detrellis.analysis.runs import ComparedRuns, Result, RunResult, add_run, run_table
from detrellis.analysis.schemes import AllGroups, all_groups, check_grouped, load_with_scheme
from detrellis.arguments import Cells, checked
from detrellis.data.batch import Batch
from detrellis.distributed import all_gather
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.console import number
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.evaluate import completed
from detrellis.engine.log import read_records
from detrellis.loading import OpenedSplit
from detrellis.schemes.distances import matched_distance, matched_positions, position_distance
from detrellis.schemes.group import Group
from detrellis.training import TrainableDetector

GRID = 8  # cells of a histogram on each side
SHUFFLES = 10  # random groups that the histogram distance is compared with


def histograms(positions: Tensor, grid: int = GRID) -> Tensor:
    """What fraction of each group's positions is in each cell, row by row from the top: `(..., K,
    N, 2)` to `(..., K, grid^2)`."""
    column, row = (positions * grid).long().clamp(0, grid - 1).unbind(-1)
    cells = F.one_hot(row * grid + column, grid**2)
    return cells.double().mean(-2)


def total_variation(histograms: Tensor) -> Tensor:
    """Half the L1 distance of the distributions of each pair of groups: `(..., K, G)` to `(...,
    P)`, 0 to 1.
    """
    groups = histograms.shape[-2]
    first, second = torch.triu_indices(groups, groups, 1, device=histograms.device)
    return (histograms[..., first, :] - histograms[..., second, :]).abs().sum(-1) / 2


def dealt(positions: Tensor, shuffles: int = SHUFFLES) -> Tensor:
    """The same positions, dealt to groups at random: `(..., K, N, 2)` to `(shuffles, ..., K, N,
    2)`.
    """
    generator = torch.Generator().manual_seed(0)
    groups, count = positions.shape[-3:-1]
    together = positions.flatten(-3, -2)
    deals = []
    for _ in range(shuffles):
        order = torch.randperm(groups * count, generator=generator).to(positions.device)
        deals.append(together[..., order, :].unflatten(-2, (groups, count)))
    return torch.stack(deals)


class GroupPositions(NamedTuple):
    """Where the queries of some images are; or of one, where they are the same in all."""

    first: Tensor  # (K, N, 2) positions in the first image
    histograms: Tensor  # (n, K, grid^2)
    distance: Tensor  # (n,) of the histograms: mean over pairs
    random: Tensor  # (n,) the same for random groups
    pd: Tensor  # (n,) mean over pairs

    @classmethod
    def of(cls, positions: Tensor, grid: int) -> GroupPositions:
        """From `(n, K, N, 2)`; on the host."""
        cells = histograms(positions, grid)
        distance = total_variation(cells).mean(-1)
        random = total_variation(histograms(dealt(positions), grid)).mean((0, -1))
        pd = position_distance(positions).mean(-1)
        return cls(*(t.cpu() for t in (positions[0], cells, distance, random, pd)))

    @classmethod
    def joined(cls, parts: Sequence[GroupPositions]) -> GroupPositions:
        """Those of several batches together."""
        first, *columns = zip(*parts, strict=True)
        return cls(first[0], *(torch.cat(column) for column in columns))


class BatchGroups(NamedTuple):
    """What one batch says of the groups, on the host."""

    positions: GroupPositions | None  # None: no positions, or those of an earlier batch
    matched: Tensor | None  # (K, T, 2) positions of each group's queries for each box
    v: list[Tensor]  # of each image, (L, N): what the first group's queries are matched to


@dataclass(frozen=True)
class LoggedDistances:
    """An epoch of the training log; means over its steps."""

    epoch: int
    pd: float | None
    md: float | None


@dataclass(frozen=True)
class RunGroups(RunResult):
    """The groups of one run. What needs positions is None where the queries have none, and `md`
    where no box is.
    """

    images: int
    boxes: int
    groups: int
    queries: int  # of one group
    fixed: bool  # whether the queries are at the same positions in every image
    positions: tuple[tuple[tuple[float, float], ...], ...] | None  # by group, in one image
    shares: tuple[tuple[float, ...], ...] | None  # by group: its histogram, mean over images
    # Total variation of two groups' histograms in an image; mean over pairs and images
    distance: float | None
    random: float | None  # the same for the positions dealt to groups at random
    pd: float | None
    md: float | None
    instability: tuple[float, ...]  # IS of the first group at each layer but the first
    scores: tuple[EvalResult, ...]  # by group
    log: tuple[LoggedDistances, ...]  # empty where the run did not log distances


@dataclass(frozen=True)
class GroupsResult(Result):
    """The groups of several runs."""

    name = "groups"
    runs: tuple[RunGroups, ...]
    grid: int
    split: str
    shuffles: int = SHUFFLES

    def table(self) -> Table:
        """For each run, a row for all groups and one for each, for a rich console."""
        caption = (
            "PD: from a query to the nearest one of another group. MD: between two groups' "
            "queries for the same box. TV: distance of the groups' histograms of positions, and "
            "in brackets that of random groups. IS: queries of group 1 in an image that are "
            "matched anew, by decoder layer. AP of raw, not averaged, weights."
        )
        columns = ("group", "AP", "AP50", "PD", "MD", "TV", "IS")
        table = run_table("Groups of queries (Group DETR)", caption, *columns, wrapped=("IS",))
        for run in self.runs:
            spread = (
                f"{number(run.distance)} ({number(run.random)})"
                if run.fixed or run.pd is not None
                else "-"
            )
            add_run(
                table,
                run.name,
                f"all {run.groups}",
                "",
                "",
                number(run.pd),
                number(run.md),
                spread,
                "",
            )
            for k, score in enumerate(run.scores):
                stats = [number(score.stats[name]) for name in ("AP", "AP50")]
                steps = " ".join(f"{x:.1f}" for x in run.instability) if k == 0 else ""
                add_run(
                    table,
                    "",
                    str(k + 1),
                    *stats,
                    "",
                    "",
                    "",
                    steps,
                    end_section=k == run.groups - 1,
                )
        return table


@checked
def analyze(runs: ComparedRuns, *, grid: Cells = GRID) -> GroupsResult:
    """Measure where the groups' queries are, how far apart, and how each group detects by itself.

    `grid` is the number of cells on each side of a histogram. Raises `UserError` for a run without
    groups or without its `last.state.pt`.
    """
    return GroupsResult(runs.measure(partial(_measure, grid), check_grouped), grid, runs.split)


def _measure(grid: int, opened: OpenedSplit, name: str, show: bool) -> RunGroups:
    model, group = load_with_scheme(opened, Group)
    evaluators = [
        CocoEvaluator(opened.annotations, top_k=model.detector.postprocess.top_k)
        for _ in range(group.k)
    ]
    parts: list[BatchGroups] = []
    fixed = True
    for batch in batches(opened, show):
        outputs = all_groups(model, group, batch)
        check_finite(opened, outputs.output.logits[-1], outputs.output.boxes[-1])
        fixed = outputs.fixed
        new = not fixed or not parts  # positions that never change are looked at once
        parts.append(_batch_groups(model, outputs, batch, grid if new else None))
        for k, evaluator in enumerate(evaluators):
            evaluator.update(
                batch.image_ids, model.detector.postprocess(outputs.of(k), batch.sizes)
            )

    # From here on of all processes.
    everywhere = [part for process in all_gather(parts) for part in process]
    scores = tuple(
        completed(evaluator).compute(of=kind_of_ap(opened.model)) for evaluator in evaluators
    )
    return RunGroups(
        name=name,
        run=opened.run,
        data=opened.files,
        images=scores[0].images,
        boxes=scores[0].ground_truth,
        groups=group.k,
        queries=group.count,
        fixed=fixed,
        **_distances(everywhere),
        instability=_instabilities([v for part in everywhere for v in part.v]),
        scores=scores,
        log=_logged(opened),
    )


def _instabilities(v: Sequence[Tensor]) -> tuple[float, ...]:
    """IS at each layer but the first; none where nothing was matched."""
    return tuple(instability(v).tolist()) if v else ()


def _batch_groups(
    model: TrainableDetector, outputs: AllGroups, batch: Batch, grid: int | None
) -> BatchGroups:
    """`grid`: None where the positions are known."""
    targets, supervision = batch.targets, model.supervision
    # Queries that predict masks alone have no place, and are matched by masks
    if not outputs.output.boxes.shape[-1]:
        return BatchGroups(None, None, [])
    assignment = one_to_one(supervision, outputs.of(0), targets)
    v = matched_boxes(assignment, targets, len(outputs.output.logits), outputs.queries)
    images = list(v.cpu().unbind(1))
    if outputs.positions is None:
        return BatchGroups(None, None, images)
    last = one_to_one(supervision, last_layer(outputs.output), targets, outputs.groups)
    matched = matched_positions(outputs.positions, [last], len(targets.labels)).cpu()
    new = outputs.positions[:1] if outputs.fixed else outputs.positions
    return BatchGroups(None if grid is None else GroupPositions.of(new, grid), matched, images)


def _distances(parts: Sequence[BatchGroups]) -> dict[str, Any]:
    """The fields of `RunGroups` about positions."""
    positions = [part.positions for part in parts if part.positions is not None]
    if not positions:
        return dict.fromkeys(("positions", "shares", "distance", "random", "pd", "md"))
    joined = GroupPositions.joined(positions)
    md = matched_distance(
        torch.cat([part.matched for part in parts if part.matched is not None], dim=1)
    ).nanmean()
    return {
        "positions": tuple(
            tuple((round(x, 5), round(y, 5)) for x, y in group) for group in joined.first.tolist()
        ),
        "shares": tuple(map(tuple, joined.histograms.mean(0).tolist())),
        "distance": float(joined.distance.mean()),
        "random": float(joined.random.mean()),
        "pd": float(joined.pd.double().mean()),
        "md": float(md) if md.isfinite() else None,
    }


def _logged(opened: OpenedSplit) -> tuple[LoggedDistances, ...]:
    """The distances that training has logged, by epoch."""
    file = Path(opened.run) / "metrics.jsonl"
    epochs = []
    for record in read_records(file) if file.is_file() else []:
        if record["kind"] == "epoch" and "group/md" in record["metrics"]:
            metrics = record["metrics"]
            epochs.append(
                LoggedDistances(record["epoch"], metrics.get("group/pd"), metrics["group/md"])
            )
    return tuple(epochs)
