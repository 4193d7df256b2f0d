"""Group DETR, Fig. 3 and 4: where the groups' queries are,
how far apart, and how alike the groups perform.

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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

from detrellis.analysis.figures import (
    BLUE,
    FAINT,
    ORANGE,
    Axes,
    Figure,
    canvas,
    colours,
    heading,
    run_rows,
    tidy,
    value_bars,
    whole_numbers,
)
from detrellis.analysis.group_positions import GRID, SHUFFLES, BatchGroups, batch_groups, distances
from detrellis.analysis.instability import instability
from detrellis.analysis.outputs import batches, check_finite, kind_of_ap
from detrellis.analysis.runs import ComparedRuns, Result, RunResult, add_run, run_table
from detrellis.analysis.schemes import all_groups, check_grouped, load_with_scheme
from detrellis.arguments import Cells, checked
from detrellis.distributed import all_gather
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.console import number
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.evaluate import completed
from detrellis.engine.log import read_records
from detrellis.loading import OpenedSplit
from detrellis.schemes.group import Group


@dataclass(frozen=True)
class LoggedDistances:
    """An epoch of the training log; means over its steps."""

    epoch: int
    pd: float | None
    md: float | None


@dataclass(frozen=True)
class RunGroups(RunResult):
    """The groups of one run. What needs positions is None where the queries have none,
    and `md` where no box is.
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
        parts.append(batch_groups(model, outputs, batch, grid if new else None))
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
        **distances(everywhere),
        instability=_instabilities([v for part in everywhere for v in part.v]),
        scores=scores,
        log=_logged(opened),
    )


def _instabilities(v: Sequence[Tensor]) -> tuple[float, ...]:
    """IS at each layer but the first; none where nothing was matched."""
    return tuple(instability(v).tolist()) if v else ()


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


# The figure
SIZE = (13.0, 5.8)  # inches of one run


def draw(result: GroupsResult) -> Figure:
    """The runs below each other: positions and four panels.
    Raises `UserError` where matplotlib is missing.
    """
    width, height = SIZE
    figure = canvas(width, height * len(result.runs) + 0.5, "Groups of queries")
    sizes = [f"{run.groups} groups of {run.queries} queries" for run in result.runs]
    for run, part in zip(result.runs, run_rows(figure, result.runs, sizes), strict=True):
        _draw_run(part, run, result.grid)
    return figure


def _draw_run(part: Any, run: RunGroups, grid: int) -> None:
    panels = part.subplot_mosaic(
        [["where", "histograms", "log"], ["where", "is", "ap"]], width_ratios=[1.45, 1, 1]
    )
    for axes in panels.values():
        tidy(axes)
    palette = colours(run.groups)
    if run.positions is None or run.shares is None:
        for name in ("where", "histograms", "log"):
            _say(panels[name], "The queries have no place.")
    else:
        _positions(panels["where"], run, palette)
        _histograms(panels["histograms"], run, grid, palette)
        _log(panels["log"], run)
    part.legend(
        handles=[_marker(colour, str(k + 1)) for k, colour in enumerate(palette)],
        title="group", ncols=run.groups, fontsize=8, title_fontsize=8, frameon=False,
        loc="outside lower left", columnspacing=1, handletextpad=0.2,
    )  # fmt: skip
    _instability(panels["is"], run)
    _scores(panels["ap"], run, palette)
    for axes in panels.values():
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)


def _say(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(
        0.5, 0.5, text, ha="center", va="center", fontsize=9, color=FAINT, transform=axes.transAxes
    )


def _marker(colour: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker="o", markersize=5, linestyle="", label=label)


def _positions(axes: Axes, run: RunGroups, palette: list[str]) -> None:
    """Fig. 3: in the order of the queries,
    not of the groups, so that no group lies above all others.
    """
    assert run.positions is not None
    points = np.array(run.positions)  # (K, N, 2)
    x, y = points.transpose(1, 0, 2).reshape(-1, 2).T
    axes.scatter(
        x, y, c=palette * run.queries, s=max(6, min(24, 6000 / len(x))), alpha=0.75, linewidths=0
    )
    where = (
        "where the queries are" if run.fixed else "where the queries are in one image (proposals)"
    )
    heading(axes, f"{where}; PD {number(run.pd)}, MD {number(run.md)}")
    axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", anchor="W")
    axes.set(xlabel="x, share of the width", ylabel="y, share of the height")


def _histograms(axes: Axes, run: RunGroups, grid: int, palette: list[str]) -> None:
    """One small map a group, side by side; the gaps between them are NaN."""
    assert run.shares is not None
    columns = min(run.groups, math.ceil(math.sqrt(1.6 * run.groups)))  # a panel is wider than high
    rows = math.ceil(run.groups / columns)
    side = grid + 1
    tiles = np.full((rows * side - 1, columns * side - 1), np.nan)
    for k, cells in enumerate(run.shares):
        top, left = k // columns * side, k % columns * side
        tiles[top : top + grid, left : left + grid] = 100 * np.array(cells).reshape(grid, grid)
        axes.text(
            left - 0.3,
            top - 0.3,
            str(k + 1),
            color=palette[k],
            fontsize=9,
            fontweight="bold",
            va="top",
        )
    axes.imshow(tiles, cmap="Greys", vmin=0)
    axes.set_axis_off()
    axes.set_anchor("W")
    heading(axes, f"histograms: distance {number(run.distance)} (random {number(run.random)})")
    each = "" if run.fixed else "mean of all images; "
    note = f"{each}black: {np.nanmax(tiles):.1f}% of a group's queries"
    axes.text(0, -0.04, note, fontsize=8, color=FAINT, va="top", transform=axes.transAxes)


def _log(axes: Axes, run: RunGroups) -> None:
    """Fig. 4."""
    if not run.log:
        _say(axes, "PD and MD in training: not logged.\nTrain with -o schemes.group.distances=true")
        return
    epochs = [x.epoch for x in run.log]
    for name, values, colour in (
        ("MD", [x.md for x in run.log], ORANGE),
        ("PD", [x.pd for x in run.log], BLUE),
    ):
        heights = [math.nan if v is None else v for v in values]
        axes.plot(
            epochs, heights, color=colour, linewidth=1.6, marker="o", markersize=3, label=name
        )
    heading(axes, "PD and MD in training")
    axes.set(xlabel="epoch", ylabel="distance")
    axes.set_ylim(bottom=0)
    whole_numbers(axes)
    axes.legend(fontsize=8, frameon=False)


def _instability(axes: Axes, run: RunGroups) -> None:
    if not run.instability:
        _say(axes, "IS: the decoder has one layer.")
        return
    names = [f"{i}→{i + 1}" for i in range(1, len(run.instability) + 1)]
    axes.plot(names, run.instability, color=BLUE, linewidth=1.6, marker="o", markersize=4)
    for i, value in enumerate(run.instability):
        axes.annotate(f"{value:.1f}", (i, value), (4, 4), textcoords="offset points", fontsize=8)
    heading(
        axes, f"instability IS of group 1; {run.boxes / max(run.images, 1):.1f} boxes in an image"
    )
    axes.set(xlabel="decoder layers", ylabel="queries matched anew")
    axes.margins(x=0.15, y=0.25)
    axes.set_ylim(bottom=0)


def _scores(axes: Axes, run: RunGroups, palette: list[str]) -> None:
    values = [s.ap for s in run.scores]
    names = [str(k + 1) for k in range(run.groups)]
    value_bars(axes, names, values, 0.7, fontsize=8 if run.groups <= 8 else 6, color=palette)
    heading(axes, "AP of each group alone")
    axes.set(xlabel="group", ylabel="AP")
    axes.margins(y=0.15)
