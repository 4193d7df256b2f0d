"""Co-DETR, Table 11: how well each head detects that reads the same encoder, the decoder and the auxiliary branches.

A branch's detections are its own: its scores (times centerness or IoU, where it predicts them) and boxes, NMS within
each class (IoU 0.6; of R-CNN, RetinaNet and FCOS 0.5), the best 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from detrellis.analysis.collaborative import DECODER, check_collaborative, decoded
from detrellis.analysis.figures import OfRun, Result, canvas, colours, sheet, shortened, tidy
from detrellis.analysis.outputs import batches, check_finite, each_run, split_name
from detrellis.analysis.schemes import begin, load_trained
from detrellis.arguments import checked
from detrellis.data.loader import Batch
from detrellis.engine.coco_eval import CocoEvaluator, EvalResult
from detrellis.engine.console import number
from detrellis.engine.evaluate import EvalOptions, completed
from detrellis.loading import OpenedSplit
from detrellis.schemes.collaborative.scene import Predictions
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.training import TrainableDetector
from detrellis.types import Detections

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SHOWN = ("AP", "AP50", "AP75")


@dataclass(frozen=True)
class Measured(OfRun):
    """One run."""

    heads: dict[str, EvalResult]  # the decoder's, then the branches' in the recipe's order

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        own = self.heads[DECODER]
        named = {"name": self.name, "run": self.run, "data": self.data}
        stats = {head: dict(result.stats) for head, result in self.heads.items()}
        return named | {"images": own.images, "boxes": own.ground_truth, "heads": stats}


@dataclass(frozen=True)
class Comparison(Result):
    """Several runs, measured in the same way."""

    name = "branches"

    split: str
    runs: tuple[Measured, ...]

    @property
    def heads(self) -> list[str]:
        """Of all runs, in their order."""
        return list(dict.fromkeys(head for run in self.runs for head in run.heads))

    def settings(self) -> dict[str, Any]:
        """What it was measured with."""
        return {"split": self.split}

    def table(self) -> Table:
        """For each run, a row for each head, for a rich console."""
        from rich.text import Text

        caption = "Raw, not averaged, weights of the last checkpoint. Branches: their own detections, after NMS."
        table = sheet("AP of the decoder and of each branch (Co-DETR, Table 11)", caption)
        table.add_column("head", no_wrap=True)
        for column in SHOWN:
            table.add_column(column, justify="right", no_wrap=True)
        for run in self.runs:
            for head, result in run.heads.items():
                first, last = head == DECODER, head == list(run.heads)[-1]
                numbers = [number(result.stats[s]) for s in SHOWN]
                # Text: a run may be called "[bold]"
                table.add_row(Text(run.name if first else ""), head, *numbers, end_section=last)
        return table

    def figure(self) -> Figure:
        """AP by head, a bar a run. Raises `UserError` where matplotlib is missing."""
        heads, count = self.heads, len(self.runs)
        figure = canvas(max(5.6, 0.55 * len(heads) * count + 2), 4.2, "AP of each head on the same encoder")
        axes = figure.subplots()
        tidy(axes)
        width = 0.8 / count
        for i, (run, colour) in enumerate(zip(self.runs, colours(count), strict=True)):
            at = [heads.index(head) + (i - (count - 1) / 2) * width for head in run.heads]
            values = [result.ap for result in run.heads.values()]
            bars = axes.bar(at, [v or 0 for v in values], width * 0.92, color=colour, label=shortened(run.name))
            axes.bar_label(bars, [number(v).lstrip("0") for v in values], fontsize=8, padding=2)
        axes.set_xticks(range(len(heads)), heads)
        axes.set_xlim(-0.6, len(heads) - 0.4)
        axes.set_ylabel("AP")
        axes.margins(y=0.12)
        for text in figure.legend(loc="outside lower left", fontsize=9, frameon=False).get_texts():
            text.set_parse_math(False)
        return figure


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
    without its `last.state.pt`.
    """
    measured = each_run(runs, names, device, progress, on, _measure, check_collaborative)
    return Comparison(split_name(on), measured)


def _measure(opened: OpenedSplit, name: str, show: bool) -> Measured:
    model, co = load_trained(opened, Collaborative)
    most = max(model.detector.postprocess.top_k, 100)
    evaluators = {head: CocoEvaluator(opened.annotations, top_k=most) for head in (DECODER, *co.names)}
    for batch in batches(opened, show):
        for head, found in detections(model, co, batch).items():
            check_finite(opened, *(d.boxes for d in found), *(d.scores for d in found))
            evaluators[head].update(batch.image_ids, found)
    return Measured(name, opened.run, opened.files, {head: completed(e).compute() for head, e in evaluators.items()})


@torch.no_grad()
def detections(model: TrainableDetector, co: Collaborative, batch: Batch) -> dict[str, list[Detections]]:
    """What each head detects in each image of a batch; the decoder as `detect` would."""
    step = begin(model, batch, model.detector.encode(batch.images))
    scene = co.scene(step)
    scale = (batch.sizes / step.sizes).flip(-1).repeat(1, 2)  # from the network's input to the original image
    found = {DECODER: model.detector.postprocess(decoded(step), batch.sizes)}
    for head, branch in zip(co.names, co.branches, strict=True):
        predicted = branch.predict(scene)  # type: ignore[operator]
        found[head] = [scaled(p, s) for p, s in zip(predicted, scale, strict=True)]
    return found


def scaled(found: Predictions, scale: Tensor) -> Detections:
    """The same with boxes times `scale (4,)`."""
    return Detections(found.scores, found.labels, found.boxes * scale)
