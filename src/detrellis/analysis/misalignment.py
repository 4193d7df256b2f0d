"""Align-DETR, Fig. 1 (left):
how far the query that localises an object best is from the one that scores highest.

The paper shows a plot and no procedure. Ours, on all queries of the last decoder layer, for every
ground-truth box `j` of class `c` that is not a crowd region:

* best-regressed: `BR = argmax_q IoU(q, j)`;
* high-confidence: `HC = argmax_q p(q, c)` among the queries with `IoU(q, j) >= threshold`. The gate
  is our choice: without it all objects of a class in an image would have one query. A box that no
  query passes it for has no HC.

Of equal queries the first counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from detrellis.analysis.figures import BLUE, FAINT, ORANGE, Axes, Figure, headline, panels
from detrellis.analysis.outputs import image_outputs
from detrellis.analysis.runs import (
    ComparedRuns,
    Result,
    RunResult,
    add_run,
    mean_or_none,
    run_table,
)
from detrellis.arguments import Iou, checked
from detrellis.boxes import pairwise_iou
from detrellis.distributed import all_gather
from detrellis.engine.console import number
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit

BINS = 20  # of the histograms of IoU; the last one holds 1 too
EDGES = tuple(i / BINS for i in range(BINS + 1))
TOP = (10, 50, 100)  # 100 is what COCO evaluates


class Pairs(NamedTuple):
    """BR and HC of each ground-truth box, of any number of images."""

    br_query: Tensor  # (n,) int64
    br_iou: Tensor  # (n,)
    # (n,) int64 how many (query, class) scores of the image are above BR's for the box's class
    br_rank: Tensor
    hc_query: Tensor  # (n,) int64, -1 where there is no HC
    hc_iou: Tensor  # (n,) NaN where there is no HC

    @classmethod
    def joined(cls, parts: Iterable[Pairs]) -> Pairs:
        """Those of several images together; there must be one."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


def pairs(
    scores: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor, threshold: float = 0.5
) -> Pairs:
    """BR and HC in one image: `scores (N, C)`,
    `boxes (N, 4)` and `truth (n, 4)` as `xyxy`, `labels (n,)`; any n.
    """
    overlap = pairwise_iou(truth, boxes)  # (n, N)
    br_iou, br_query = overlap.max(-1)
    class_scores = scores[:, labels].T  # (n, N) each query's score for the box's class
    br_score = class_scores.gather(1, br_query[:, None])
    rank = (scores.flatten() > br_score).sum(-1)

    passed = overlap >= threshold
    none = ~passed.any(-1)
    hc_query = class_scores.masked_fill(~passed, -torch.inf).argmax(-1)
    hc_iou = overlap.gather(1, hc_query[:, None]).squeeze(1)
    return Pairs(
        br_query, br_iou, rank, hc_query.masked_fill(none, -1), hc_iou.masked_fill(none, torch.nan)
    )


@dataclass(frozen=True)
class Misalignment:
    """Statistics of a set of boxes. A mean is None where no box counts:
    there is no box, or none with an HC.
    """

    boxes: int
    with_hc: int
    br_iou: float | None  # mean over all boxes
    hc_iou: float | None  # mean over the boxes with an HC
    gap: float | None  # mean of IoU(BR) - IoU(HC) over the boxes with an HC
    hit_rate: float | None  # fraction of all boxes whose BR and HC are the same query
    # By m: fraction of all boxes whose BR is among the image's m highest scores
    br_recall: dict[int, float | None]
    br_histogram: tuple[int, ...]  # boxes in each bin of `EDGES`
    hc_histogram: tuple[int, ...]

    @classmethod
    def of(cls, pairs: Pairs, top: Sequence[int] = TOP) -> Misalignment:
        """The statistics of all boxes together."""
        has = pairs.hc_query >= 0
        hc_iou = pairs.hc_iou[has]
        return cls(
            boxes=len(has),
            with_hc=int(has.sum()),
            br_iou=mean_or_none(pairs.br_iou),
            hc_iou=mean_or_none(hc_iou),
            gap=mean_or_none(pairs.br_iou[has] - hc_iou),
            hit_rate=mean_or_none(pairs.br_query == pairs.hc_query),
            br_recall={m: mean_or_none(pairs.br_rank < m) for m in top},
            br_histogram=_histogram(pairs.br_iou),
            hc_histogram=_histogram(hc_iou),
        )


def _histogram(values: Tensor) -> tuple[int, ...]:
    # Clamp: equal boxes may round to a little above 1
    counts, _ = np.histogram(values.clamp(max=1).numpy(), EDGES)
    return tuple(counts.tolist())


@dataclass(frozen=True)
class RunMisalignment(RunResult):
    """One run: the statistics of the boxes in all its images."""

    images: int
    statistics: Misalignment


@dataclass(frozen=True)
class MisalignmentResult(Result):
    """The misalignment of several runs."""

    name = "misalignment"
    runs: tuple[RunMisalignment, ...]
    threshold: float
    top: tuple[int, ...]
    split: str
    edges: tuple[float, ...] = EDGES  # of the histograms' bins

    def table(self) -> Table:
        caption = (
            "BR: the query with the highest IoU with a box. HC: the one with the highest score "
            f"for its class among those with IoU >= {self.threshold:g}. HC and gap are means "
            "over the boxes with an HC, the rest over all."
        )
        title = "IoU of best-regressed (BR) and high-confidence (HC) queries"
        recalls = (f"BR in\ntop {m}" for m in self.top)
        table = run_table(
            title, caption, "boxes", "with\nHC", "BR", "HC", "gap", "hit\nrate", *recalls
        )
        for run in self.runs:
            statistics = run.statistics
            means = [number(x) for x in (statistics.br_iou, statistics.hc_iou, statistics.gap)]
            rates = [
                number(x, ".1%") for x in (statistics.hit_rate, *statistics.br_recall.values())
            ]
            add_run(table, run.name, str(statistics.boxes), str(statistics.with_hc), *means, *rates)
        return table


@checked
def analyze(
    runs: ComparedRuns, *, threshold: Iou = 0.5, top: Sequence[int] = TOP
) -> MisalignmentResult:
    """Measure how far best-regressed and high-confidence queries are apart.

    `threshold` is the IoU that an HC needs, `top` are the values of m for BR-recall@m. Raises
    `UserError` where a run or its data set cannot be read, or has nothing to measure.
    """
    if not top or min(top) < 1:
        raise UserError(
            f"top {', '.join(map(str, top)) or 'nothing'}",
            "Give numbers of detections, such as 10,100.",
        )
    ordered = tuple(sorted(set(top)))
    return MisalignmentResult(
        runs.measure(partial(_measure, threshold, ordered)), threshold, ordered, runs.split
    )


def _measure(
    threshold: float, top: Sequence[int], opened: OpenedSplit, name: str, show: bool
) -> RunMisalignment:
    images = [
        pairs(i.scores, i.boxes, i.labels, i.truth, threshold) for i in image_outputs(opened, show)
    ]
    everywhere = Pairs.joined(p for part in all_gather(images) for p in part)
    if not len(everywhere.br_query):
        raise UserError(
            f"{opened.files}: no box to measure, only crowd regions",
            "Take another --split or --data.",
        )
    statistics = Misalignment.of(everywhere, top)
    return RunMisalignment(name, opened.run, opened.files, len(opened.annotations), statistics)


def draw(result: MisalignmentResult) -> Figure:
    """The histograms of BR and of HC, in one panel a run.
    Raises `UserError` where matplotlib is missing.
    """
    figure, grid = panels(len(result.runs), "Best-regressed (BR) and high-confidence (HC) queries")
    for run, axes in zip(result.runs, grid, strict=True):
        _histograms(axes, run, result.threshold)
    return figure


def _histograms(axes: Axes, run: RunMisalignment, threshold: float) -> None:
    values = run.statistics
    boxes = max(values.boxes, 1)
    axes.axvline(
        threshold, color=FAINT, linewidth=1, linestyle=":", label=f"HC needs IoU >= {threshold:g}"
    )
    for name, counts, mean, colour in (
        ("BR, all boxes", values.br_histogram, values.br_iou, BLUE),
        (f"HC, {values.with_hc / boxes:.1%} of boxes", values.hc_histogram, values.hc_iou, ORANGE),
    ):
        percent = 100 * np.array(counts) / boxes
        axes.stairs(percent, EDGES, fill=True, color=colour, alpha=0.3)
        axes.stairs(
            percent, EDGES, color=colour, linewidth=1.4, label=f"{name}: mean {number(mean)}"
        )
        if mean is not None:
            axes.axvline(mean, color=colour, linewidth=1.2, linestyle="--")
    hits = number(values.hit_rate, ".1%")
    headline(axes, run.name, f"gap {number(values.gap)}, hit rate {hits}, {values.boxes:,} boxes")
    axes.set(xlim=(0, 1), xlabel="IoU with the ground-truth box", ylabel="% of boxes")
    # Room for the legend; not set_ylim, which would fix the axis that all panels have in common
    axes.margins(y=0.4)
    axes.legend(fontsize=8, loc="upper left", facecolor="white", edgecolor="none", framealpha=0.9)
