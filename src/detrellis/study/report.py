"""The results of a study: those of each row,
compared with its baseline seed by seed. docs/compare.md defines them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detrellis.engine.bootstrap import half_interval
from detrellis.engine.means import mean_of_known
from detrellis.study.plan import StudyPlan, StudyRow, TrialOutcome
from detrellis.study.results import Estimate, TrialResult, estimate, read_trial, timed_alike


@dataclass(frozen=True)
class RowResult:
    """The results of one row over its finished seeds, of which there is at least one."""

    planned: StudyRow
    runs: tuple[TrialResult, ...]  # one for each finished seed
    # Final AP minus the baseline's of the same seed; None: no baseline, or no seed shared
    gain: Estimate | None = None
    published_gain: float | None = None
    cost: float | None = None  # step time relative to the baseline's
    # First epoch whose mean AP is what the baseline ends with; None: none
    epochs_to_baseline: int | None = None
    # Seconds of training when the fastest of this row, its baseline and its peers ends; None: all
    # end together.
    budget: float | None = None
    # Epoch and mean AP of the last evaluation within the budget
    timely: tuple[int, float] | None = None
    gain_after_nms: Estimate | None = None  # as `gain`, of AP after NMS

    @property
    def name(self) -> str:
        """The name of the row."""
        return self.planned.name

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
        """AP50 after the last epoch."""
        return estimate([run.ap50 for run in self.runs])

    @property
    def ap75(self) -> Estimate:
        """AP75 after the last epoch."""
        return estimate([run.ap75 for run in self.runs])

    @property
    def after_nms(self) -> tuple[Estimate, Estimate, Estimate] | None:
        """AP, AP50 and AP75 after the last epoch where duplicates are dropped;
        None where no seed has them.
        """
        known = [run.after_nms for run in self.runs if run.after_nms is not None]
        if not known:
            return None
        ap, ap50, ap75 = (estimate(values) for values in zip(*known, strict=True))
        return ap, ap50, ap75

    @property
    def duplicates(self) -> float | None:
        """The AP that duplicates cost: what NMS adds. None where no seed was evaluated with NMS."""
        costs = [run.after_nms[0] - run.final for run in self.runs if run.after_nms is not None]
        return mean_of_known(costs)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """The evaluated epochs, and the mean AP over the seeds after each."""
        return mean_curve(self.runs)

    @property
    def step_seconds(self) -> float | None:
        """The time of a training step, as the mean over the seeds."""
        return mean_of_known(run.step_seconds for run in self.runs)

    @property
    def epoch_seconds(self) -> float | None:
        """The time of training in an epoch, as the mean over the seeds."""
        return mean_of_known(run.epoch_seconds for run in self.runs)

    @property
    def memory(self) -> int | None:
        """The peak memory of any seed, in bytes:
        allocated on the GPU, or without one all that the process had.
        """
        return max(
            (run.machine["peak_memory"] for run in self.runs if run.machine.get("peak_memory")),
            default=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON holds them."""
        named = ("final", "best", "ap50", "ap75", "gain", "gain_after_nms")
        estimates = {
            name: None if (e := getattr(self, name)) is None else e._asdict() for name in named
        }
        apart = self.after_nms and dict(zip(("AP", "AP50", "AP75"), self.after_nms, strict=True))
        plain = (
            "step_seconds",
            "epoch_seconds",
            "memory",
            "cost",
            "epochs_to_baseline",
            "budget",
            "published_gain",
        )
        return {
            **{
                name: getattr(self.planned, name)
                for name in ("name", "against", "note", "published")
            },
            **estimates,
            "after_nms": apart and {name: e._asdict() for name, e in apart.items()},
            **{name: getattr(self, name) for name in plain},
            "timely": None
            if self.timely is None
            else dict(zip(("epoch", "ap"), self.timely, strict=True)),
            "curve": [list(point) for point in self.curve],
            "runs": [run.to_dict() for run in self.runs],
        }


@dataclass(frozen=True)
class StudyReport:
    """The results of all rows that have a finished seed, in the plan's order."""

    plan: StudyPlan
    rows: tuple[RowResult, ...]
    unfinished: tuple[TrialOutcome, ...]

    def row(self, name: str | None) -> RowResult | None:
        """The results of the row of that name, if any of its seeds is finished."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def others(self) -> list[RowResult]:
        """The rows that are compared with a baseline."""
        return [row for row in self.rows if row.gain is not None]


def read_report(plan: StudyPlan, outcomes: Sequence[TrialOutcome]) -> StudyReport:
    """Read the finished trials from their folders, and compare the rows."""
    results: dict[str, tuple[TrialResult, ...]] = {}
    for row in plan.rows:
        finished = [o for o in outcomes if o.trial.row == row.name and o.state == "finished"]
        runs = [read_trial(o.folder, o.trial.seed, row.recipe.optim.batch_size) for o in finished]
        if any(runs):
            results[row.name] = tuple(run for run in runs if run is not None)
    results = timed_alike(results)
    rows = tuple(_row_result(row, plan, results) for row in plan.rows if row.name in results)
    return StudyReport(plan, rows, tuple(o for o in outcomes if o.state != "finished"))


def _row_result(
    row: StudyRow, plan: StudyPlan, results: Mapping[str, tuple[TrialResult, ...]]
) -> RowResult:
    runs, base = results[row.name], row.against or row.name
    # The budget: the training time of the fastest among the rows that share this one's baseline.
    peers = [
        results[r.name] for r in plan.rows if base in (r.name, r.against) and r.name in results
    ]
    times = (
        []
        if plan.pace is not None
        else [s for of_peer in peers if (s := _seconds(of_peer)) is not None]
    )
    budget = min(times, default=None)
    timely = _timely(runs, budget)
    if base not in results:
        return RowResult(row, runs, budget=budget, timely=timely)
    # What the row gains over its baseline, and what it costs.
    base_runs = results[base]
    gain = _gain(runs, base_runs) if row.against else None
    gain_after_nms = _gain(runs, base_runs, after_nms=True) if row.against else None
    step, base_step = (
        mean_of_known(run.step_seconds for run in some) for some in (runs, base_runs)
    )
    published, base_published = row.published, plan.row(base).published
    return RowResult(
        row,
        runs,
        gain,
        None
        if published is None or base_published is None or not row.against
        else published - base_published,
        None if step is None or not base_step else step / base_step,
        _reached(mean_curve(runs), mean_curve(base_runs)[-1][1]),
        budget,
        timely,
        gain_after_nms,
    )


def _gain(
    runs: Sequence[TrialResult], base_runs: Sequence[TrialResult], after_nms: bool = False
) -> Estimate | None:
    """Over the seeds that both have:
    the row's AP minus the baseline's; None where there is no such seed.
    """
    base = {run.seed: run for run in base_runs}
    differences, resampled = [], []
    for run in runs:
        other = base.get(run.seed)
        after, before = (None if r is None else _final(r, after_nms) for r in (run, other))
        if other is None or after is None or before is None:
            continue
        differences.append(after - before)
        draws = (r.resampled_after_nms if after_nms else r.resampled for r in (run, other))
        resampled.append([one - two for one, two in zip(*draws, strict=False)])
    if not differences:
        return None
    # Seeds and images are independent sources of noise: the squares of their intervals add up.
    gain = estimate(differences)
    over_images = half_interval([statistics.fmean(draw) for draw in zip(*resampled, strict=False)])
    if gain.interval is None or over_images is None:
        return gain
    return gain._replace(with_images=math.hypot(gain.interval, over_images))


def _final(run: TrialResult, after_nms: bool) -> float | None:
    if not after_nms:
        return run.final
    return None if run.after_nms is None else run.after_nms[0]


def mean_curve(runs: Sequence[TrialResult]) -> list[tuple[int, float]]:
    """Epochs that all seeds evaluated, and the mean AP after each."""
    curves = [dict(zip(run.epochs, run.ap, strict=True)) for run in runs]
    common = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
    return [(epoch, sum(curve[epoch] for curve in curves) / len(curves)) for epoch in common]


def _reached(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    return next((epoch for epoch, ap in curve if ap >= target), None)


def _seconds(runs: Sequence[TrialResult]) -> float | None:
    """The time of training to the last epoch, without evaluations."""
    epoch = mean_of_known(run.epoch_seconds for run in runs)
    return None if epoch is None else epoch * runs[0].epochs[-1]


def _timely(runs: Sequence[TrialResult], budget: float | None) -> tuple[int, float] | None:
    """The last evaluated epoch within the budget, and the mean AP after it."""
    epoch_seconds = mean_of_known(run.epoch_seconds for run in runs)
    if budget is None or epoch_seconds is None:
        return None
    within = [
        point for point in mean_curve(runs) if point[0] * epoch_seconds <= budget * (1 + 1e-9)
    ]
    return within[-1] if within else None
