"""What a study found: a line for each row, compared with its baseline seed by seed. docs/compare.md defines it all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detrellis.study.numbers import Estimate, Measured, estimate, mean, measured, timed_alike
from detrellis.study.plan import Outcome, Plan, Row


@dataclass(frozen=True)
class Line:
    """One row over its finished seeds, of which there is at least one."""

    row: Row
    runs: tuple[Measured, ...]
    gain: Estimate | None = None  # final AP minus the baseline's of the same seed; None: no baseline, or no seed shared
    published_gain: float | None = None
    cost: float | None = None  # step time relative to the baseline's
    epochs_to_baseline: int | None = None  # first epoch whose mean AP is what the baseline ends with; None: none
    # Seconds of training when the fastest of this row, its baseline and its peers ends; None: all end together.
    budget: float | None = None
    timely: tuple[int, float] | None = None  # epoch and mean AP of the last evaluation within the budget
    gain_after_nms: Estimate | None = None  # as `gain`, of AP after NMS

    @property
    def name(self) -> str:
        """The row's."""
        return self.row.name

    @property
    def final(self) -> Estimate:
        """AP after the last epoch."""
        return estimate([run.final for run in self.runs])

    @property
    def best(self) -> Estimate:
        """Highest AP after any epoch."""
        return estimate([run.best for run in self.runs])

    @property
    def ap50(self) -> Estimate:
        """After the last epoch."""
        return estimate([run.ap50 for run in self.runs])

    @property
    def ap75(self) -> Estimate:
        """After the last epoch."""
        return estimate([run.ap75 for run in self.runs])

    @property
    def after_nms(self) -> tuple[Estimate, Estimate, Estimate] | None:
        """AP, AP50 and AP75 after the last epoch where duplicates are dropped; None where no seed has them."""
        known = [run.after_nms for run in self.runs if run.after_nms is not None]
        if not known:
            return None
        ap, ap50, ap75 = (estimate(values) for values in zip(*known, strict=True))
        return ap, ap50, ap75

    @property
    def duplicates(self) -> float | None:
        """AP that they cost: what NMS adds."""
        costs = [run.after_nms[0] - run.final for run in self.runs if run.after_nms is not None]
        return mean(costs)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Epochs and the mean AP after each."""
        return mean_curve(self.runs)

    @property
    def step_seconds(self) -> float | None:
        """Mean over the seeds."""
        return mean(run.step_seconds for run in self.runs)

    @property
    def epoch_seconds(self) -> float | None:
        """Mean over the seeds."""
        return mean(run.epoch_seconds for run in self.runs)

    @property
    def memory(self) -> int | None:
        """Highest of any seed, in bytes: allocated on the GPU, or without one all that the process had."""
        return max((run.machine["peak_memory"] for run in self.runs if run.machine.get("peak_memory")), default=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        named = ("final", "best", "ap50", "ap75", "gain", "gain_after_nms")
        estimates = {name: None if (e := getattr(self, name)) is None else e._asdict() for name in named}
        apart = self.after_nms and dict(zip(("AP", "AP50", "AP75"), self.after_nms, strict=True))
        plain = ("step_seconds", "epoch_seconds", "memory", "cost", "epochs_to_baseline", "budget", "published_gain")
        return {
            **{name: getattr(self.row, name) for name in ("name", "against", "note", "published")},
            **estimates,
            "after_nms": apart and {name: e._asdict() for name, e in apart.items()},
            **{name: getattr(self, name) for name in plain},
            "timely": None if self.timely is None else dict(zip(("epoch", "ap"), self.timely, strict=True)),
            "curve": [list(point) for point in self.curve],
            "runs": [{**vars(run), "machine": dict(run.machine)} for run in self.runs],
        }


@dataclass(frozen=True)
class Report:
    """All rows that have a finished seed, in the plan's order."""

    plan: Plan
    lines: tuple[Line, ...]
    unfinished: tuple[Outcome, ...]

    def line(self, name: str | None) -> Line | None:
        """The line of that row, if any of its seeds is finished."""
        return next((line for line in self.lines if line.name == name), None)

    @property
    def others(self) -> list[Line]:
        """Those that are compared with a baseline."""
        return [line for line in self.lines if line.gain is not None]


def report(plan: Plan, outcomes: Sequence[Outcome]) -> Report:
    """Read the finished trials."""
    found: dict[str, tuple[Measured, ...]] = {}
    for row in plan.rows:
        done = [o for o in outcomes if o.trial.row == row.name and o.state == "finished"]
        runs = [measured(o.folder, o.trial.seed, row.recipe.optim.batch_size) for o in done]
        if any(runs):
            found[row.name] = tuple(run for run in runs if run is not None)
    found = timed_alike(found)
    lines = tuple(_line(row, plan, found) for row in plan.rows if row.name in found)
    return Report(plan, lines, tuple(o for o in outcomes if o.state != "finished"))


def _line(row: Row, plan: Plan, found: Mapping[str, tuple[Measured, ...]]) -> Line:
    runs, base = found[row.name], row.against or row.name
    alike = [found[r.name] for r in plan.rows if base in (r.name, r.against) and r.name in found]
    times = [] if plan.pace is not None else [s for some in alike if (s := _seconds(some)) is not None]
    budget = min(times, default=None)
    timely = _timely(runs, budget)
    if base not in found:
        return Line(row, runs, budget=budget, timely=timely)
    base_runs = found[base]
    gain = _gain(runs, base_runs, lambda run: run.final) if row.against else None
    gain_after_nms = _gain(runs, base_runs, lambda run: run.after_nms and run.after_nms[0]) if row.against else None
    step, base_step = (mean(run.step_seconds for run in some) for some in (runs, base_runs))
    here, there = row.published, plan.row(base).published
    return Line(
        row,
        runs,
        gain,
        None if here is None or there is None or not row.against else here - there,
        None if step is None or not base_step else step / base_step,
        _reached(mean_curve(runs), mean_curve(base_runs)[-1][1]),
        budget,
        timely,
        gain_after_nms,
    )


def _gain(
    runs: Sequence[Measured], base_runs: Sequence[Measured], value: Callable[[Measured], float | None]
) -> Estimate | None:
    """Over the seeds that both have: the row's value minus the baseline's; None where there is no such seed."""
    base = {run.seed: value(run) for run in base_runs}
    pairs = [(value(run), base.get(run.seed)) for run in runs]
    deltas = [own - its for own, its in pairs if own is not None and its is not None]
    return estimate(deltas) if deltas else None


def mean_curve(runs: Sequence[Measured]) -> list[tuple[int, float]]:
    """Epochs that all seeds evaluated, and the mean AP after each."""
    curves = [dict(zip(run.epochs, run.ap, strict=True)) for run in runs]
    common = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
    return [(epoch, sum(curve[epoch] for curve in curves) / len(curves)) for epoch in common]


def _reached(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    return next((epoch for epoch, ap in curve if ap >= target), None)


def _seconds(runs: Sequence[Measured]) -> float | None:
    """Of training to the last epoch, without evaluations."""
    epoch = mean(run.epoch_seconds for run in runs)
    return None if epoch is None else epoch * runs[0].epochs[-1]


def _timely(runs: Sequence[Measured], budget: float | None) -> tuple[int, float] | None:
    epoch_seconds = mean(run.epoch_seconds for run in runs)
    if budget is None or epoch_seconds is None:
        return None
    within = [point for point in mean_curve(runs) if point[0] * epoch_seconds <= budget * (1 + 1e-9)]
    return within[-1] if within else None
