"""IS, instability of the matching (DN-DETR, section 3.2):
how many queries learn something else than before.

`V` holds, for each query, the ground-truth box that it is matched to, or -1. Between two snapshots
of the same image, IS is the number of entries that changed. Snapshots are the epochs of a run, as
in DN-DETR and in Co-DETR's Fig. 5 (`analyze`); they may be decoder layers as well (`groups.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from detrellis.analysis.figures import (
    Figure,
    as_written,
    canvas,
    colours,
    shortened,
    tidy,
    whole_numbers,
)
from detrellis.analysis.outputs import batches, check_finite, one_to_one, refuse_without_boxes
from detrellis.analysis.runs import ComparedRuns, Result, RunResult, add_run, run_table
from detrellis.arguments import checked
from detrellis.data.batch import Batch
from detrellis.distributed import all_gather
from detrellis.engine.checkpoint import fill, find_weights, load_weights
from detrellis.engine.console import number
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.recipes.build import build_supervision
from detrellis.supervision import Supervision
from detrellis.types import Assignment, Targets


def matched_boxes(assignment: Assignment, targets: Targets, layers: int, queries: int) -> Tensor:
    """V by layer `(L, B, N)`: the place of each query's target among those of its image, or -1."""
    v = torch.full((layers, len(targets.sizes), queries), -1, device=assignment.query.device)
    first = torch.tensor(targets.offsets, device=assignment.query.device)
    v[assignment.layer, assignment.image, assignment.query] = (
        assignment.target - first[assignment.image]
    )
    return v


def changed(v: Tensor) -> Tensor:
    """Entries of V that differ from the snapshot before: `(T, ..., N)` to `(T - 1, ...)`."""
    return (v[1:] != v[:-1]).sum(-1)


def instability(images: Iterable[Tensor]) -> Tensor:
    """IS: the mean over images of V `(T, N)`, whose N may differ:
    `(T - 1,)` in float64; there must be one image.
    """
    return torch.stack([changed(v) for v in images]).double().mean(0)


def kept_epochs(run: str | Path) -> list[Path]:
    """The weights files of a run's epochs, in order.
    Raises `UserError` where there are fewer than two.
    """
    find_weights(Path(run))
    files = sorted(
        (Path(run) / "epochs").glob("*.safetensors"), key=lambda p: (len(p.stem), p.stem)
    )
    if len(files) < 2:
        what = (
            f"weights of one epoch only ({files[0].stem})" if files else "no weights of its epochs"
        )
        raise UserError(
            f"{run}: {what}",
            "IS compares epochs. Train a run that keeps them: detrellis train ... -o "
            "schedule.keep_every=1.",
        )
    return files


@dataclass(frozen=True)
class RunInstability(RunResult):
    """IS along one run."""

    images: int
    boxes: int
    epochs: tuple[int, ...]  # whose weights were kept
    instability: tuple[float, ...]  # IS at each of them but the first

    @property
    def mean(self) -> float:
        """The mean IS over the epochs."""
        return sum(self.instability) / len(self.instability)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"mean": self.mean}


@dataclass(frozen=True)
class InstabilityResult(Result):
    """IS along several runs."""

    name = "instability"
    runs: tuple[RunInstability, ...]
    split: str

    def table(self) -> Table:
        caption = (
            "IS: queries in an image whose matched box (or none) is not the one of the epoch "
            "before; mean over images. A box that changes its query counts twice."
        )
        title = "Instability of the matching from epoch to epoch (DN-DETR, Co-DETR)"
        table = run_table(
            title, caption, "epochs", "boxes in\nan image", "first\nIS", "last\nIS", "mean\nIS"
        )
        for run in self.runs:
            values = [number(x) for x in (run.instability[0], run.instability[-1], run.mean)]
            add_run(table, run.name, _span(run.epochs), f"{run.boxes / run.images:.1f}", *values)
        return table


def _span(epochs: Sequence[int]) -> str:
    """The epochs in a word: "1 to 12", "2 to 12 by 2", or all of them."""
    step = epochs[1] - epochs[0]
    if list(epochs) != list(range(epochs[0], epochs[-1] + 1, step)):
        return ", ".join(map(str, epochs))
    return f"{epochs[0]} to {epochs[-1]}" + (f" by {step}" if step > 1 else "")


@checked
def analyze(runs: ComparedRuns) -> InstabilityResult:
    """Measure IS between the epochs whose weights a run has kept.

    Raises `UserError` for a run that did not keep them, and where there is no box to be matched.
    """
    return InstabilityResult(runs.measure(_measure, kept_epochs), runs.split)


def _measure(opened: OpenedSplit, name: str, show: bool) -> RunInstability:
    refuse_without_boxes(opened.model, opened.run)
    boxes = int((~opened.annotations.crowd).sum())
    if not boxes:
        raise UserError(
            f"{opened.files}: no box to match, only crowd regions",
            "Take another --split or --data.",
        )

    # V of two epochs at a time: there may be many epochs, and many images.
    epochs: list[int] = []
    changes: list[list[int]] = []  # by epoch but the first, and image
    before: list[Tensor] = []
    supervision = build_supervision(opened.model.recipe)
    for file in kept_epochs(opened.run):
        weights, card = load_weights(file)
        fill(opened.model.detector, weights, file)
        now: list[Tensor] = []
        for batch in batches(opened, show, f"epoch {card.epoch}"):
            now += _matched(opened, supervision, batch)
        if epochs:
            changes.append(
                [int(changed(torch.stack(pair))) for pair in zip(before, now, strict=True)]
            )
        epochs.append(card.epoch)
        before = now

    everywhere = torch.cat(all_gather(torch.tensor(changes)), dim=1)
    values = tuple(everywhere.double().mean(1).tolist())
    return RunInstability(
        name, opened.run, opened.files, everywhere.shape[1], boxes, tuple(epochs), values
    )


@torch.no_grad()
def _matched(opened: OpenedSplit, supervision: Supervision, batch: Batch) -> Tensor:
    """V of the last layer in each image, `(B, N)`."""
    output = opened.model.detector(batch.images)
    check_finite(opened, output.logits, output.boxes)
    assignment = one_to_one(supervision, output, batch.targets)
    return matched_boxes(assignment, batch.targets, 1, output.boxes.shape[2])[0].cpu()


def draw(result: InstabilityResult) -> Figure:
    """IS by epoch, a curve a run. Raises `UserError` where matplotlib is missing."""
    figure = canvas(6.4, 4.2, "Instability of the matching")
    axes = figure.subplots()
    tidy(axes)
    for run, colour in zip(result.runs, colours(len(result.runs)), strict=True):
        label = f"{shortened(run.name)}: mean {number(run.mean)}"
        axes.plot(
            run.epochs[1:],
            run.instability,
            color=colour,
            linewidth=1.6,
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set(xlabel="epoch", ylabel="queries in an image that are matched anew")
    axes.set_ylim(bottom=0)
    whole_numbers(axes)
    as_written(axes.legend(fontsize=9, frameon=False))
    return figure
