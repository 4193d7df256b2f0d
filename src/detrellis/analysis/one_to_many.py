"""Group DETR, Fig. 1: AP over the number of training queries,
by how queries are assigned to objects.

| assignment | a run is of this kind if its recipe has | training queries |
| --- | --- | --- |
| group-wise | scheme `group` | all K groups' |
| one-to-many | `loss.one_to_many` above 1: each target is matched to so many queries in every layer | the detector's |
| one-to-one | neither | the detector's |

One-to-many leaves duplicates. Such a run is evaluated as it is and with NMS (within each class), by
several thresholds of IoU. NMS takes all (query, class) pairs and the best `top_k` are kept after
it: duplicates would otherwise fill the places that the objects found less surely need, and NMS be
blamed for what the cut has lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal, get_args

from rich.table import Table

from detrellis.analysis.figures import BLUE, COLOURS, ORANGE, Figure, canvas, tidy
from detrellis.analysis.outputs import batches, check_finite, kind_of_ap
from detrellis.analysis.runs import ComparedRuns, Result, RunResult, add_run, run_table
from detrellis.arguments import checked
from detrellis.engine.console import number
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.evaluate import collect
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.recipes.build import build_schemes
from detrellis.recipes.config import Recipe
from detrellis.types import DecoderOutput

NMS = (0.5, 0.6, 0.7, 0.8)  # IoU from which a box is a duplicate of a better one
DRAWN = 0.7  # the paper does not say; this one, or the nearest, is in the figure

Kind = Literal["one-to-one", "one-to-many", "group-wise"]


def kind_of(recipe: Recipe) -> Kind:
    """How its training assigns queries to objects."""
    if recipe.schemes.group is not None:
        return "group-wise"
    return "one-to-many" if recipe.loss.one_to_many > 1 else "one-to-one"


@dataclass(frozen=True)
class RunOneToMany(RunResult):
    """One run: how its queries are assigned, and how well it detects."""

    kind: Kind
    queries: int  # that are matched in training, in all groups
    per_target: int  # of them, that each target is matched to in a decoder layer
    result: EvalResult  # as the detector is
    nms: dict[float, EvalResult]  # by threshold; empty unless one-to-many

    def to_dict(self) -> dict[str, Any]:
        values = {
            k: getattr(self, k) for k in ("name", "run", "data", "kind", "queries", "per_target")
        }
        counts = {"images": self.result.images, "boxes": self.result.ground_truth}
        nms = {f"{threshold:g}": dict(result.stats) for threshold, result in self.nms.items()}
        return values | counts | {"stats": dict(self.result.stats), "nms": nms}


@dataclass(frozen=True)
class OneToManyResult(Result):
    """Several runs, by how their queries are assigned."""

    name = "one_to_many"
    runs: tuple[RunOneToMany, ...]
    nms: tuple[float, ...]  # thresholds, rising
    split: str

    @property
    def drawn(self) -> float:
        """The threshold that the figure shows."""
        return min(self.nms, key=lambda t: abs(t - DRAWN))

    def settings(self) -> dict[str, Any]:
        return {"nms": list(self.nms), "drawn": self.drawn, "split": self.split}

    def table(self) -> Table:
        title = "AP by assignment (Group DETR, Fig. 1)"
        caption = (
            "Queries: all that are matched in training. The right columns are AP after NMS "
            "within each class."
        )
        after = (f"NMS\n{t:g}" for t in self.nms)
        table = run_table(
            title, caption, "assignment", "queries", "per\nbox", "AP", *after, left=("assignment",)
        )
        for run in sorted(self.runs, key=lambda r: (get_args(Kind).index(r.kind), r.queries)):
            values = [
                number(run.result.ap),
                *(number(run.nms[t].ap) if t in run.nms else "" for t in self.nms),
            ]
            add_run(table, run.name, run.kind, str(run.queries), str(run.per_target), *values)
        return table

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """(queries, AP) of all runs by what the figure calls them, rising;
        runs without an AP are left out.
        """
        after_nms = f"one-to-many, NMS {self.drawn:g}"
        results = {
            kind: [(r.queries, r.result) for r in self.runs if r.kind == kind]
            for kind in get_args(Kind)
        }
        results[after_nms] = [(r.queries, r.nms[self.drawn]) for r in self.runs if r.nms]
        curves = {}
        for name in ("group-wise", "one-to-one", after_nms, "one-to-many"):
            points = sorted(
                (queries, result.ap) for queries, result in results[name] if result.ap is not None
            )
            if points:
                curves[name] = points
        return curves


@checked
def analyze(runs: ComparedRuns, *, nms: Sequence[float] = NMS) -> OneToManyResult:
    """Measure AP, and of runs with one-to-many assignment also that after NMS.

    `nms` are thresholds of IoU. Raises `UserError` where a run or its data set cannot be read.
    """
    if not nms or not all(0 < t < 1 for t in nms):
        raise UserError(
            f"nms {', '.join(f'{t:g}' for t in nms) or 'nothing'}",
            "Give IoUs between 0 and 1: 0.5,0.7.",
        )
    ordered = tuple(sorted(set(nms)))
    return OneToManyResult(runs.measure(partial(_measure, ordered)), ordered, runs.split)


def _measure(nms: Sequence[float], opened: OpenedSplit, name: str, show: bool) -> RunOneToMany:
    recipe = opened.model.recipe
    kind = kind_of(recipe)
    result, after = _evaluate(opened, nms if kind == "one-to-many" else (), show)
    queries, groups = _queries(opened)
    per_target = groups * recipe.loss.one_to_many
    return RunOneToMany(name, opened.run, opened.files, kind, queries, per_target, result, after)


def _queries(opened: OpenedSplit) -> tuple[int, int]:
    """How many are matched in training, and in how many groups; denoising's are not matched."""
    config, detector = opened.model.recipe.detector, opened.model.detector
    count = config.queries.count * max(config.queries.patterns, 1)
    if opened.model.recipe.schemes.group is None:
        return count, 1
    schemes = build_schemes(opened.model.recipe, detector, len(opened.model.classes), seed=0)
    further = sum(s.extra_queries for s in schemes if s.name == "group")
    return count + further, 1 + further // count


def _evaluate(
    opened: OpenedSplit, nms: Sequence[float], show: bool
) -> tuple[EvalResult, dict[float, EvalResult]]:
    """The evaluation as the detector detects, and those after NMS by each threshold."""

    def check(output: DecoderOutput) -> None:
        check_finite(opened, output.logits, output.boxes)

    model, thresholds = opened.model, (None, *nms)
    evaluators = collect(
        model.detector, batches(opened, show), opened.annotations, model.device, thresholds, check
    )
    plain, *after = (evaluator.compute(of=kind_of_ap(model)) for evaluator in evaluators)
    return plain, dict(zip(nms, after, strict=True))


# The figure
LOOKS = {"group-wise": ("o", BLUE), "one-to-one": ("s", COLOURS[2]), "one-to-many": ("v", ORANGE)}
AFTER_NMS = ("^", COLOURS[3])


def draw(result: OneToManyResult) -> Figure:
    """Fig. 1: a point a run, and a curve through the mean of runs alike.
    Raises `UserError` without matplotlib.
    """
    figure = canvas(6.4, 4.6, "AP by assignment")
    axes = figure.subplots()
    tidy(axes)
    for name, points in result.curves().items():
        marker, colour = LOOKS.get(name, AFTER_NMS)
        counts = sorted({queries for queries, _ in points})
        means = [fmean(ap for queries, ap in points if queries == count) for count in counts]
        axes.plot(counts, means, color=colour, linewidth=1.6)
        axes.plot(
            *zip(*points, strict=True),
            marker,
            color=colour,
            markersize=6,
            label=name,
            clip_on=False,
        )
    axes.set(xlabel="queries in training", ylabel="AP")
    axes.margins(x=0.08)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({run.queries for run in result.runs}))
    if axes.lines:
        axes.legend(fontsize=9, loc="best", frameon=False)
    return figure
