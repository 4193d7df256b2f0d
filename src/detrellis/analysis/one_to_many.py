"""Group DETR, Fig. 1: AP over the number of training queries, by how queries are assigned to objects.

| assignment | a run is of this kind if its recipe has | training queries |
| --- | --- | --- |
| group-wise | scheme `group` | all K groups' |
| one-to-many | `loss.one_to_many` above 1: each target is matched to so many queries in every layer | the detector's |
| one-to-one | neither | the detector's |

One-to-many leaves duplicates. Such a run is evaluated as it is and with NMS (within each class), by several thresholds
of IoU. NMS takes all (query, class) pairs and the best `top_k` are kept after it: duplicates would otherwise fill the
places that the objects found less surely need, and NMS be blamed for what the cut has lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

from detrellis.analysis.figures import BLUE, COLOURS, ORANGE, OfRun, Result, canvas, sheet, tidy
from detrellis.analysis.outputs import batches, check_finite, each_run, split_name
from detrellis.arguments import checked
from detrellis.engine.coco_eval import EvalResult
from detrellis.engine.console import number
from detrellis.engine.evaluate import EvalOptions, collect
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.recipes.build import build_schemes
from detrellis.recipes.config import Recipe
from detrellis.types import DecoderOutput

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

NMS = (0.5, 0.6, 0.7, 0.8)  # IoU from which a box is a duplicate of a better one
DRAWN = 0.7  # the paper does not say; this one, or the nearest, is in the figure

Kind = Literal["one-to-one", "one-to-many", "group-wise"]


def kind_of(recipe: Recipe) -> Kind:
    """How its training assigns queries to objects."""
    if recipe.schemes.group is not None:
        return "group-wise"
    return "one-to-many" if recipe.loss.one_to_many > 1 else "one-to-one"


@dataclass(frozen=True)
class Measured(OfRun):
    """One run."""

    kind: Kind
    queries: int  # that are matched in training, in all groups
    per_target: int  # of them, that each target is matched to in a decoder layer
    result: EvalResult  # as the detector is
    nms: dict[float, EvalResult]  # by threshold; empty unless one-to-many

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        stats = {"stats": dict(self.result.stats), "nms": {f"{t:g}": dict(r.stats) for t, r in self.nms.items()}}
        named = {k: getattr(self, k) for k in ("name", "run", "data", "kind", "queries", "per_target")}
        return named | {"images": self.result.images, "boxes": self.result.ground_truth} | stats


@dataclass(frozen=True)
class Comparison(Result):
    """Several runs, measured in the same way."""

    name = "one_to_many"

    nms: tuple[float, ...]
    split: str
    runs: tuple[Measured, ...]

    @property
    def drawn(self) -> float:
        """The threshold that the figure shows."""
        return min(self.nms, key=lambda t: abs(t - DRAWN))

    def settings(self) -> dict[str, Any]:
        """What it was measured with."""
        return {"nms": list(self.nms), "drawn": self.drawn, "split": self.split}

    def table(self) -> Table:
        """One row a run, for a rich console."""
        from rich.text import Text

        title = "AP by assignment (Group DETR, Fig. 1)"
        caption = "Queries: all that are matched in training. The right columns are AP after NMS within each class."
        table = sheet(title, caption)
        table.add_column("assignment", no_wrap=True)
        for column in ("queries", "per\nbox", "AP", *(f"NMS\n{t:g}" for t in self.nms)):
            table.add_column(column, justify="right", no_wrap=True)
        for run in sorted(self.runs, key=lambda r: (get_args(Kind).index(r.kind), r.queries)):
            after = [number(run.nms[t].ap) if t in run.nms else "" for t in self.nms]
            row = (run.kind, str(run.queries), str(run.per_target), number(run.result.ap), *after)
            table.add_row(Text(run.name), *row)  # Text: a run may be called "[bold]"
        return table

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """(queries, AP) of all runs by what the figure calls them; runs without an AP are left out."""
        found: dict[str, list[tuple[int, float]]] = {}
        nms = f"one-to-many, NMS {self.drawn:g}"
        for name in ("group-wise", "one-to-one", nms, "one-to-many"):
            results = [
                (r.queries, r.nms[self.drawn] if name == nms else r.result)
                for r in self.runs
                if r.kind == name.partition(",")[0]
            ]
            if points := sorted((n, result.ap) for n, result in results if result.ap is not None):
                found[name] = points
        return found

    def figure(self) -> Figure:
        """Fig. 1. Raises `UserError` where matplotlib is missing."""
        figure = canvas(6.4, 4.6, "AP by assignment")
        axes = figure.subplots()
        tidy(axes)
        looks = {"group-wise": ("o", BLUE), "one-to-one": ("s", COLOURS[2]), "one-to-many": ("v", ORANGE)}
        for name, points in self.curves().items():
            marker, colour = looks.get(name, ("^", COLOURS[3]))
            at = sorted({n for n, _ in points})
            means = [_mean(ap for n, ap in points if n == x) for x in at]
            axes.plot(at, means, color=colour, linewidth=1.6)
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, label=name, clip_on=False)
        axes.set(xlabel="queries in training", ylabel="AP")
        axes.margins(x=0.08)
        axes.set_ylim(bottom=0)
        axes.set_xticks(sorted({run.queries for run in self.runs}))
        if axes.lines:
            axes.legend(fontsize=9, loc="best", frameon=False)
        return figure


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


@checked
def analyze(
    runs: str | Path | Sequence[str | Path],
    *,
    nms: Sequence[float] = NMS,
    names: Sequence[str] | None = None,
    device: str | None = None,
    progress: bool = False,
    **on: Unpack[EvalOptions],
) -> Comparison:
    """Measure one run or several, each on its own validation split or on what `on` says (see `engine/evaluate.py`).

    `nms` are IoU thresholds, `names` what the runs are called (default: their folders). Raises `UserError` where the
    data set has errors.
    """
    if not nms or not all(0 < t < 1 for t in nms):
        raise UserError(f"nms {', '.join(f'{t:g}' for t in nms) or 'nothing'}", "Give IoUs between 0 and 1: 0.5,0.7.")
    ordered = tuple(sorted(set(nms)))
    return Comparison(ordered, split_name(on), each_run(runs, names, device, progress, on, partial(_measure, ordered)))


def _measure(nms: Sequence[float], opened: OpenedSplit, name: str, show: bool) -> Measured:
    recipe = opened.model.recipe
    kind = kind_of(recipe)
    result, after = _evaluate(opened, nms if kind == "one-to-many" else (), show)
    queries, groups = _queries(opened)
    return Measured(name, opened.run, opened.files, kind, queries, groups * recipe.loss.one_to_many, result, after)


def _queries(opened: OpenedSplit) -> tuple[int, int]:
    """Those that are matched in training, and in how many groups; denoising's are not matched."""
    config, detector = opened.model.recipe.detector, opened.model.detector
    count = config.query_count * max(config.patterns, 1)
    if opened.model.recipe.schemes.group is None:
        return count, 1
    schemes = build_schemes(opened.model.recipe, detector, len(opened.model.classes), seed=0)
    further = sum(s.extra_queries for s in schemes if s.name == "group")
    return count + further, 1 + further // count


def _evaluate(opened: OpenedSplit, nms: Sequence[float], show: bool) -> tuple[EvalResult, dict[float, EvalResult]]:
    """As the detector detects, and after NMS by each threshold."""

    def check(output: DecoderOutput) -> None:
        check_finite(opened, output.logits, output.boxes)

    model, thresholds = opened.model, (None, *nms)
    found = collect(model.detector, batches(opened, show), opened.annotations, model.device, thresholds, check)
    plain, *after = (evaluator.compute() for evaluator in found)
    return plain, dict(zip(nms, after, strict=True))
