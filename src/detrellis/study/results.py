"""The results of a trial from its log, and their mean over seeds.
AP is in percent, as the papers print it.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from detrellis.data.files import read_object
from detrellis.engine.log import read_records
from detrellis.study.plan import DONE

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over seeds. `spread`: their standard deviation;
    `interval`: half of the 95 % t-interval of the mean.

    Both are None with one seed. `with_images`: half of the interval that holds, besides, what other
    validation images would change; None where they were not resampled.
    """

    mean: float
    spread: float | None
    interval: float | None
    seeds: int
    with_images: float | None = None

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0, else 0;
        also with one seed, which cannot tell.
        """
        if self.interval is None or abs(self.mean) <= self.interval:
            return 0
        return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float]) -> Estimate:
    """The estimate from at least one value."""
    from scipy.special import stdtrit

    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean, None, None, 1)
    spread = statistics.stdev(values)
    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    return Estimate(mean, spread, quantile * spread / math.sqrt(count), count)


@dataclass(frozen=True)
class TrialResult:
    """The results of one finished trial."""

    seed: int
    epochs: tuple[int, ...]  # those that were evaluated
    ap: tuple[float, ...]  # after each of them
    ap50: float  # after the last, as ap75
    ap75: float
    step_seconds: float | None  # of training, without evaluation
    epoch_seconds: float | None
    # The content of `done.json`: device, threads, torch, jobs, peak_memory
    machine: Mapping[str, Any]
    # AP, AP50, AP75 of the last, without duplicates
    after_nms: tuple[float, float, float] | None = None
    # The last AP, and that after NMS, of each resampling of the validation images; the same draws
    # in all trials.
    resampled: tuple[float, ...] = ()
    resampled_after_nms: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON holds them, without the resampled APs."""
        plain = {
            name: value for name, value in vars(self).items() if not name.startswith("resampled")
        }
        return plain | {"machine": dict(self.machine)}

    @property
    def setting(self) -> tuple[Any, ...]:
        """The setting that times depend on: those of runs with another one do not compare."""
        return tuple(self.machine.get(name) for name in ("device", "threads", "jobs"))

    @property
    def final(self) -> float:
        """AP after the last epoch."""
        return self.ap[-1]

    @property
    def best(self) -> float:
        """Highest AP after any epoch."""
        return max(self.ap)


def read_trial(folder: Path, seed: int, batch_size: int) -> TrialResult | None:
    """The results of a finished trial, or None where no epoch has an AP;
    of a branch, that after the last epoch alone.

    A step's time is that of the epoch in the middle, so that neither a first epoch that compiles
    nor a slow neighbour counts. It is taken from the rate of images, which a run that was stopped
    within an epoch has right too.
    """
    records = [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "epoch"]
    evaluated = [r for r in records if r["eval"] and r["eval"]["AP"] is not None]
    if not evaluated:
        return None
    rates = [r["images_per_second"] for r in records if r["images_per_second"]]
    step = batch_size / statistics.median(rates) if rates else None
    steps = records[-1]["step"] / records[-1]["epoch"]
    last, apart = evaluated[-1]["eval"], evaluated[-1].get("after_nms")
    machine = read_object(folder / DONE, again="Remove it: the same command writes it again")
    branch = machine.pop("branch", None)
    whole = TrialResult(
        seed,
        tuple(r["epoch"] for r in evaluated),
        tuple(100 * r["eval"]["AP"] for r in evaluated),
        100 * last["AP50"],
        100 * last["AP75"],
        step,
        None if step is None else step * steps,
        machine,
        None if apart is None else (100 * apart["AP"], 100 * apart["AP50"], 100 * apart["AP75"]),
        *(_resampled(evaluated[-1], name) for name in ("eval", "after_nms")),
    )
    return whole if branch is None else _of_branch(whole, branch)


def _of_branch(run: TrialResult, stats: Mapping[str, float | None]) -> TrialResult | None:
    """The results of a run's branch instead of its detector's; None where it has no AP."""
    values = (stats[name] for name in ("AP", "AP50", "AP75"))
    ap, ap50, ap75 = (math.nan if value is None else 100 * value for value in values)
    if math.isnan(ap):
        return None
    none: dict[str, Any] = {"after_nms": None, "resampled": (), "resampled_after_nms": ()}
    return replace(run, epochs=run.epochs[-1:], ap=(ap,), ap50=ap50, ap75=ap75, **none)


def _resampled(record: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = (record.get("resampled") or {}).get(name, ())
    return tuple(math.nan if value is None else 100 * value for value in values)


def timed_alike(results: Mapping[str, Sequence[TrialResult]]) -> dict[str, tuple[TrialResult, ...]]:
    """Each row's runs, with times and memory of those only that share the setting of most runs: the
    rest of the study may have been trained elsewhere."""
    settings = Counter(run.setting for runs in results.values() for run in runs)
    usual = max(settings, key=settings.__getitem__, default=None)
    timed = {}
    for name, runs in results.items():
        timed[name] = tuple(run if run.setting == usual else untimed(run) for run in runs)
    return timed


def untimed(run: TrialResult) -> TrialResult:
    """The run's results without those that depend on the machine."""
    machine = dict(run.machine) | {"peak_memory": None}
    return replace(run, step_seconds=None, epoch_seconds=None, machine=machine)
