"""Align-DETR, Fig. 1 (left): how far the query that localises an object best is from the one that scores highest.

The paper shows a plot and no procedure. Ours, on all queries of the last decoder layer, for every ground-truth box `j`
of class `c` that is not a crowd region:

* best-regressed: `BR = argmax_q IoU(q, j)`;
* high-confidence: `HC = argmax_q p(q, c)` among the queries with `IoU(q, j) >= threshold`. The gate is our choice:
  without it all objects of a class in an image would share one query. A box that no query passes it for has no HC.

Of equal queries the first counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from detrellis.analysis.figures import BLUE, FAINT, ORANGE, OfRun, Result, headline, panels, sheet
from detrellis.analysis.outputs import each_run, seen, split_name
from detrellis.arguments import Iou, checked
from detrellis.boxes import pairwise_iou
from detrellis.distributed import all_gather
from detrellis.engine.console import number
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

BINS = 20  # of the histograms of IoU; the last one holds 1 too
EDGES = tuple(i / BINS for i in range(BINS + 1))
TOP = (10, 50, 100)  # 100 is what COCO evaluates


class Pairs(NamedTuple):
    """BR and HC of each ground-truth box, of any number of images."""

    br_query: Tensor  # (n,) int64
    br_iou: Tensor  # (n,)
    br_rank: Tensor  # (n,) int64 how many (query, class) scores of the image are above BR's for the box's class
    hc_query: Tensor  # (n,) int64, -1 where there is no HC
    hc_iou: Tensor  # (n,) NaN where there is no HC

    @classmethod
    def joined(cls, parts: Iterable[Pairs]) -> Pairs:
        """Of several images; there must be one."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


def pairs(scores: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor, threshold: float = 0.5) -> Pairs:
    """BR and HC in one image: `scores (N, C)`, `boxes (N, 4)` and `truth (n, 4)` as `xyxy`, `labels (n,)`; any n."""
    overlap = pairwise_iou(truth, boxes)  # (n, N)
    br_iou, br_query = overlap.max(-1)
    own = scores[:, labels].T  # (n, N) each query's score for the box's class
    passed = overlap >= threshold
    hc_query = own.masked_fill(~passed, -torch.inf).argmax(-1)
    hc_iou = overlap.gather(1, hc_query[:, None]).squeeze(1)
    br_score = own.gather(1, br_query[:, None])
    rank = (scores.flatten() > br_score).sum(-1)
    none = ~passed.any(-1)
    return Pairs(br_query, br_iou, rank, hc_query.masked_fill(none, -1), hc_iou.masked_fill(none, torch.nan))


@dataclass(frozen=True)
class Misalignment:
    """One set of boxes. A number is None where no box has it: there is no box, or none with an HC."""

    boxes: int
    with_hc: int
    br_iou: float | None  # mean over all boxes
    hc_iou: float | None  # mean over the boxes with an HC
    gap: float | None  # mean of IoU(BR) - IoU(HC) over the boxes with an HC
    hit_rate: float | None  # share of all boxes whose BR and HC are the same query
    br_recall: dict[int, float | None]  # by m: share of all boxes whose BR is among the image's m highest scores
    br_histogram: tuple[int, ...]  # boxes in each bin of `EDGES`
    hc_histogram: tuple[int, ...]

    @classmethod
    def of(cls, found: Pairs, top: Sequence[int] = TOP) -> Misalignment:
        """The statistics of all boxes together."""
        has = found.hc_query >= 0
        hc_iou = found.hc_iou[has]
        return cls(
            boxes=len(has),
            with_hc=int(has.sum()),
            br_iou=_mean(found.br_iou),
            hc_iou=_mean(hc_iou),
            gap=_mean(found.br_iou[has] - hc_iou),
            hit_rate=_mean(found.br_query == found.hc_query),
            br_recall={m: _mean(found.br_rank < m) for m in top},
            br_histogram=_histogram(found.br_iou),
            hc_histogram=_histogram(hc_iou),
        )


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _histogram(values: Tensor) -> tuple[int, ...]:
    counts, _ = np.histogram(values.clamp(max=1).numpy(), EDGES)  # clamp: equal boxes may round to a little above 1
    return tuple(counts.tolist())


@dataclass(frozen=True)
class Measured(OfRun):
    """One run."""

    images: int
    found: Misalignment

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        found = asdict(self.found)
        found["br_recall"] = {str(m): share for m, share in self.found.br_recall.items()}
        found |= {key: list(found[key]) for key in ("br_histogram", "hc_histogram")}
        return {"name": self.name, "run": self.run, "data": self.data, "images": self.images} | found


@dataclass(frozen=True)
class Comparison(Result):
    """Several runs, measured in the same way."""

    name = "misalignment"

    threshold: float
    top: tuple[int, ...]
    split: str
    runs: tuple[Measured, ...]

    def settings(self) -> dict[str, Any]:
        """What it was measured with."""
        return {"threshold": self.threshold, "top": list(self.top), "split": self.split, "edges": list(EDGES)}

    def table(self) -> Table:
        """One row a run, for a rich console."""
        from rich.text import Text

        caption = (
            f"BR: the query with the highest IoU with a box. HC: the one with the highest score for its class among "
            f"those with IoU >= {self.threshold:g}. HC and gap are means over the boxes with an HC, the rest over all."
        )
        title = "IoU of best-regressed (BR) and high-confidence (HC) queries"
        table = sheet(title, caption)
        for column in ("boxes", "with\nHC", "BR", "HC", "gap", "hit\nrate", *(f"BR in\ntop {m}" for m in self.top)):
            table.add_column(column, justify="right", no_wrap=True)
        for run in self.runs:  # Text: a run may be called "[bold]"
            found = run.found
            numbers = [number(x) for x in (found.br_iou, found.hc_iou, found.gap)]
            shares = [_percent(x) for x in (found.hit_rate, *found.br_recall.values())]
            table.add_row(Text(run.name), str(found.boxes), str(found.with_hc), *numbers, *shares)
        return table

    def figure(self) -> Figure:
        """Both histograms of IoU, in one panel a run. Raises `UserError` where matplotlib is missing."""
        figure, axes = panels(len(self.runs), "Best-regressed (BR) and high-confidence (HC) queries")
        for run, own in zip(self.runs, axes, strict=True):
            _draw(own, run, self.threshold)
        return figure


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _draw(axes: Axes, run: Measured, threshold: float) -> None:
    found = run.found
    share = found.with_hc / max(found.boxes, 1)
    axes.axvline(threshold, color=FAINT, linewidth=1, linestyle=":", label=f"HC needs IoU >= {threshold:g}")
    for name, counts, mean, colour in (
        ("BR, all boxes", found.br_histogram, found.br_iou, BLUE),
        (f"HC, {_percent(share)} of boxes", found.hc_histogram, found.hc_iou, ORANGE),
    ):
        shares = 100 * np.array(counts) / max(found.boxes, 1)
        axes.stairs(shares, EDGES, fill=True, color=colour, alpha=0.3)
        axes.stairs(shares, EDGES, color=colour, linewidth=1.4, label=f"{name}: mean {number(mean)}")
        if mean is not None:
            axes.axvline(mean, color=colour, linewidth=1.2, linestyle="--")
    headline(axes, run.name, f"gap {number(found.gap)}, hit rate {_percent(found.hit_rate)}, {found.boxes:,} boxes")
    axes.set(xlim=(0, 1), xlabel="IoU with the ground-truth box", ylabel="% of boxes")
    axes.margins(y=0.4)  # room for the legend; not set_ylim, which would fix the axis that all panels share
    axes.legend(fontsize=8, loc="upper left", facecolor="white", edgecolor="none", framealpha=0.9)


@checked
def analyze(
    runs: str | Path | Sequence[str | Path],
    *,
    threshold: Iou = 0.5,
    top: Sequence[int] = TOP,
    names: Sequence[str] | None = None,
    device: str | None = None,
    progress: bool = False,
    **on: Unpack[EvalOptions],
) -> Comparison:
    """Measure one run or several, each on its own validation split or on what `on` says (see `engine/evaluate.py`).

    `threshold` is the IoU that an HC needs, `top` the values of m for BR-recall@m, `names` what the runs are called
    (default: their folders). Raises `UserError` where the data set has errors or nothing to measure.
    """
    if not top or min(top) < 1:
        raise UserError(f"top {', '.join(map(str, top)) or 'nothing'}", "Give numbers of detections, such as 10,100.")
    ordered = tuple(sorted(set(top)))
    measured = each_run(runs, names, device, progress, on, partial(_measure, threshold, ordered))
    return Comparison(threshold, ordered, split_name(on), measured)


def _measure(threshold: float, top: Sequence[int], opened: OpenedSplit, name: str, show: bool) -> Measured:
    found = [pairs(s.scores, s.boxes, s.labels, s.truth, threshold) for s in seen(opened, show)]
    everywhere = Pairs.joined(p for part in all_gather(found) for p in part)
    if not len(everywhere.br_query):
        raise UserError(f"{opened.files}: no box to measure, only crowd regions", "Take another --split or --data.")
    return Measured(name, opened.run, opened.files, len(opened.annotations), Misalignment.of(everywhere, top))
