"""IS, instability of the matching (DN-DETR, section 3.2): how many queries learn something else than before.

`V` holds, for each query, the ground-truth box that it is matched to, or -1. Between two snapshots of the same image,
IS is the number of entries that changed. Snapshots are the epochs of a run, as in DN-DETR and in Co-DETR's Fig. 5
(`analyze`); they may be decoder layers as well (`groups.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from detrellis.analysis.figures import OfRun, Result, canvas, colours, sheet, shortened, tidy
from detrellis.analysis.outputs import batches, check_finite, each_run, one_to_one, split_name
from detrellis.arguments import checked
from detrellis.data.loader import Batch
from detrellis.distributed import all_gather
from detrellis.engine.checkpoint import fill, find_weights, load_weights
from detrellis.engine.console import number
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.recipes.build import build_supervision
from detrellis.supervision import Supervision
from detrellis.types import Assignment, Targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def matched_boxes(found: Assignment, targets: Targets, layers: int, queries: int) -> Tensor:
    """V by layer `(L, B, N)`: the place of each query's target among those of its image, or -1."""
    v = torch.full((layers, len(targets.sizes), queries), -1, device=found.query.device)
    first = torch.tensor(targets.offsets, device=found.query.device)
    v[found.layer, found.image, found.query] = found.target - first[found.image]
    return v


def changed(v: Tensor) -> Tensor:
    """Entries of V that differ from the snapshot before: `(T, ..., N)` to `(T - 1, ...)`."""
    return (v[1:] != v[:-1]).sum(-1)


def instability(images: Iterable[Tensor]) -> Tensor:
    """IS: the mean over images of V `(T, N)`, whose N may differ: `(T - 1,)` in float64; there must be one image."""
    return torch.stack([changed(v) for v in images]).double().mean(0)


def kept_epochs(run: str | Path) -> list[Path]:
    """The weights files of a run's epochs, in order. Raises `UserError` where there are fewer than two."""
    find_weights(Path(run))
    found = sorted((Path(run) / "epochs").glob("*.safetensors"), key=lambda p: (len(p.stem), p.stem))
    if len(found) < 2:
        what = f"weights of one epoch only ({found[0].stem})" if found else "no weights of its epochs"
        raise UserError(
            f"{run}: {what}",
            "IS compares epochs. Train a run that keeps them: detrellis train ... -o schedule.keep_every=1.",
        )
    return found


@dataclass(frozen=True)
class Measured(OfRun):
    """One run."""

    images: int
    boxes: int
    epochs: tuple[int, ...]  # whose weights were kept
    instability: tuple[float, ...]  # IS at each of them but the first

    @property
    def mean(self) -> float:
        """Over the epochs."""
        return sum(self.instability) / len(self.instability)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()} | {"mean": self.mean}


@dataclass(frozen=True)
class Comparison(Result):
    """Several runs, measured in the same way."""

    name = "instability"

    split: str
    runs: tuple[Measured, ...]

    def settings(self) -> dict[str, Any]:
        """What it was measured with."""
        return {"split": self.split}

    def table(self) -> Table:
        """One row a run, for a rich console."""
        from rich.text import Text

        caption = (
            "IS: queries in an image whose matched box (or none) is not the one of the epoch before; mean over images. "
            "A box that changes its query counts twice."
        )
        table = sheet("Instability of the matching from epoch to epoch (DN-DETR, Co-DETR)", caption)
        for column in ("epochs", "boxes in\nan image", "first\nIS", "last\nIS", "mean\nIS"):
            table.add_column(column, justify="right", no_wrap=True)
        for run in self.runs:  # Text: a run may be called "[bold]"
            numbers = [number(x) for x in (run.instability[0], run.instability[-1], run.mean)]
            table.add_row(Text(run.name), _span(run.epochs), f"{run.boxes / run.images:.1f}", *numbers)
        return table

    def figure(self) -> Figure:
        """IS by epoch, a curve a run. Raises `UserError` where matplotlib is missing."""
        from matplotlib.ticker import MaxNLocator

        figure = canvas(6.4, 4.2, "Instability of the matching")
        axes = figure.subplots()
        tidy(axes)
        for run, colour in zip(self.runs, colours(len(self.runs)), strict=True):
            label = f"{shortened(run.name)}: mean {number(run.mean)}"
            axes.plot(
                run.epochs[1:], run.instability, color=colour, linewidth=1.6, marker="o", markersize=4, label=label
            )
        axes.set(xlabel="epoch", ylabel="queries in an image that are matched anew")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for text in axes.legend(fontsize=9, frameon=False).get_texts():
            text.set_parse_math(False)
        return figure


def _span(epochs: Sequence[int]) -> str:
    """The epochs in a word: "1 to 12", "2 to 12 by 2", or all of them."""
    step = epochs[1] - epochs[0]
    if list(epochs) != list(range(epochs[0], epochs[-1] + 1, step)):
        return ", ".join(map(str, epochs))
    return f"{epochs[0]} to {epochs[-1]}" + (f" by {step}" if step > 1 else "")


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

    `names` are what the runs are called (default: their folders). Raises `UserError` for a run that did not keep the
    weights of its epochs, and where there is no box to be matched.
    """
    return Comparison(split_name(on), each_run(runs, names, device, progress, on, _measure, kept_epochs))


def _measure(opened: OpenedSplit, name: str, show: bool) -> Measured:
    epochs: list[int] = []
    changes: list[list[int]] = []  # by epoch but the first, and image
    before: list[Tensor] = []
    boxes = int((~opened.annotations.crowd).sum())
    if not boxes:
        raise UserError(f"{opened.files}: no box to match, only crowd regions", "Take another --split or --data.")
    supervision = build_supervision(opened.model.recipe)
    for file in kept_epochs(opened.run):
        weights, card = load_weights(file)
        fill(opened.model.detector, weights, file)
        every = batches(opened, show, f"epoch {card.epoch}")
        now = [v for batch in every for v in _matched(opened, supervision, batch)]
        if epochs:
            changes.append([int(changed(torch.stack(pair))) for pair in zip(before, now, strict=True)])
        epochs.append(card.epoch)
        before = now
    everywhere = torch.cat(all_gather(torch.tensor(changes)), dim=1)
    found = everywhere.double().mean(1).tolist()
    return Measured(name, opened.run, opened.files, everywhere.shape[1], boxes, tuple(epochs), tuple(found))


@torch.no_grad()
def _matched(opened: OpenedSplit, supervision: Supervision, batch: Batch) -> Tensor:
    """V of the last layer in each image, `(B, N)`."""
    output = opened.model.detector(batch.images)
    check_finite(opened, output.logits, output.boxes)
    found = one_to_one(supervision, output, batch.targets)
    return matched_boxes(found, batch.targets, 1, output.boxes.shape[2])[0].cpu()
