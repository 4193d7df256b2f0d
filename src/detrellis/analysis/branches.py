"""Co-DETR, Table 11: how well each head detects that reads the same encoder,
the decoder and the auxiliary branches.

A branch's detections are its own: its scores (times centerness or IoU, where it predicts them) and
boxes, NMS within each class (IoU 0.6; of R-CNN, RetinaNet and FCOS 0.5), the best 100.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    value_bars,
)
from detrellis.analysis.outputs import batches, check_finite
from detrellis.analysis.runs import ComparedRuns, Result, RunResult, add_run, as_json, run_table
from detrellis.analysis.schemes import (
    DECODER,
    begin,
    check_collaborative,
    decode_main,
    load_with_scheme,
)
from detrellis.arguments import checked
from detrellis.data.batch import Batch
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.console import number
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.evaluate import completed
from detrellis.loading import OpenedSplit
from detrellis.schemes.collaborative.scene import Predictions
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.training import TrainableDetector
from detrellis.types import Detections

SHOWN = ("AP", "AP50", "AP75")
MOST = 100  # detections of an image that COCO's AP counts


@dataclass(frozen=True)
class RunBranches(RunResult):
    """How well each head of one run detects."""

    heads: dict[str, EvalResult]  # the decoder's, then the branches' in the recipe's order

    def to_dict(self) -> dict[str, Any]:
        counts = {"images": self.heads[DECODER].images, "boxes": self.heads[DECODER].ground_truth}
        return {
            "name": self.name,
            "run": self.run,
            "data": self.data,
            **counts,
            "heads": as_json(self.heads),
        }


@dataclass(frozen=True)
class BranchesResult(Result):
    """How well each head of several runs detects."""

    name = "branches"
    runs: tuple[RunBranches, ...]
    split: str

    @property
    def heads(self) -> list[str]:
        """The heads of all runs, in their order."""
        return list(dict.fromkeys(head for run in self.runs for head in run.heads))

    def table(self) -> Table:
        """For each run, a row for each head, for a rich console."""
        caption = (
            "Raw, not averaged, weights of the last checkpoint. Branches: their own detections, "
            "after NMS."
        )
        title = "AP of the decoder and of each branch (Co-DETR, Table 11)"
        table = run_table(title, caption, "head", *SHOWN, left=("head",))
        for run in self.runs:
            for head, result in run.heads.items():
                values = [number(result.stats[name]) for name in SHOWN]
                last = head == list(run.heads)[-1]
                add_run(table, run.name if head == DECODER else "", head, *values, end_section=last)
        return table


@checked
def analyze(runs: ComparedRuns) -> BranchesResult:
    """Measure the AP of the decoder and of each auxiliary branch by itself.

    Raises `UserError` for a run without branches or without its `last.state.pt`.
    """
    return BranchesResult(runs.measure(_measure, check_collaborative), runs.split)


def _measure(opened: OpenedSplit, name: str, show: bool) -> RunBranches:
    model, co = load_with_scheme(opened, Collaborative)
    top_k = max(model.detector.postprocess.top_k, MOST)
    evaluators = {
        head: CocoEvaluator(opened.annotations, top_k=top_k) for head in (DECODER, *co.named)
    }
    for batch in batches(opened, show):
        for head, images in detections(model, co, batch).items():
            check_finite(opened, *(d.boxes for d in images), *(d.scores for d in images))
            evaluators[head].update(batch.image_ids, images)
    results = {head: completed(evaluator).compute() for head, evaluator in evaluators.items()}
    return RunBranches(name, opened.run, opened.files, results)


@torch.no_grad()
def detections(
    model: TrainableDetector, co: Collaborative, batch: Batch
) -> dict[str, list[Detections]]:
    """What each head detects in each image of a batch; the decoder as `detect` would."""
    step = begin(model, batch)
    scene = co.scene(step)
    # From the network's input to the original image
    scale = (batch.sizes / step.sizes).flip(-1).repeat(1, 2)
    heads = {DECODER: model.detector.postprocess(decode_main(step), batch.sizes)}
    for head, branch in co.named.items():
        predicted = branch.predict(scene)
        heads[head] = [scaled(p, s) for p, s in zip(predicted, scale, strict=True)]
    return heads


def scaled(predicted: Predictions, scale: Tensor) -> Detections:
    """The same with boxes times `scale (4,)`."""
    return Detections(predicted.scores, predicted.labels, predicted.boxes * scale)


def draw(result: BranchesResult) -> Figure:
    """AP by head, a bar a run. Raises `UserError` where matplotlib is missing."""
    heads, count = result.heads, len(result.runs)
    figure = canvas(
        max(5.6, 0.55 * len(heads) * count + 2), 4.2, "AP of each head on the same encoder"
    )
    axes = figure.subplots()
    tidy(axes)
    width = 0.8 / count
    for i, (run, colour) in enumerate(zip(result.runs, colours(count), strict=True)):
        places = [heads.index(head) + (i - (count - 1) / 2) * width for head in run.heads]
        values = [evaluated.ap for evaluated in run.heads.values()]
        value_bars(axes, places, values, width * 0.92, color=colour, label=shortened(run.name))
    axes.set_xticks(range(len(heads)), heads)
    axes.set_xlim(-0.6, len(heads) - 0.4)
    axes.set_ylabel("AP")
    axes.margins(y=0.12)
    as_written(figure.legend(loc="outside lower left", fontsize=9, frameon=False))
    return figure
