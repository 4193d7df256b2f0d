"""Trains a plan: each trial in a process of its own, here or on a cluster,
several at a time, until all are done or somebody stops them."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from detrellis.atomic import replace_text
from detrellis.data.findings import SkipBad
from detrellis.engine.trackers import ORDER
from detrellis.recipes.migrate import FORMAT
from detrellis.signals import sigterm_interrupts
from detrellis.study.board import Board
from detrellis.study.launch import POLL_SECONDS, Job, Launcher, Local
from detrellis.study.plan import DONE, LOG, StudyPlan, TrialOutcome

LOOK_SECONDS = 5.0  # between two looks at how well the running trials do
TAIL_LINES, BELOW = 12, 2  # of a failed trial's log, and of them below the exception
# The last before its first step
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM)
EXCEPTION = re.compile(r"[\w.]+(Error|Exception)\b")


@dataclass(frozen=True)
class Resources:
    """What the trials run on, which decides how fast;
    it changes what is trained by no more than rounding.
    """

    jobs: int = 1  # trials at a time
    # CPU threads of all together; None: OMP_NUM_THREADS for each, or all there are
    threads: int | None = None
    workers: int = 1  # processes that load images, of each trial
    device: str | None = None  # several with commas: trials are dealt out to them
    launcher: Launcher = field(default_factory=Local)
    track: tuple[str, ...] = ()  # trackers that each trial logs to

    def devices(self) -> list[str | None]:
        """The device of each job that runs at the same time."""
        given = [None] if self.device is None else [d.strip() for d in self.device.split(",")]
        return [given[i % len(given)] for i in range(self.jobs)]

    def threads_each(self) -> int | None:
        """The CPU threads of a trial; None: as the environment says."""
        if not self.launcher.here or (self.threads is None and "OMP_NUM_THREADS" in os.environ):
            return None
        return max(1, (self.threads or os.cpu_count() or 1) // self.jobs)


@dataclass(frozen=True)
class Conditions:
    """What all trials of a study have in common."""

    data: Mapping[str, Any]  # the `DataSource`, as `to_dict` gives it
    skip_bad: SkipBad = False


class TrialSource(Protocol):
    """Says what a study trains next, and hears what became of it."""

    outcomes: list[TrialOutcome]  # of all trials so far, finished ones too

    def total(self) -> int:
        """How many outcomes there are to be in the end."""

    def next(self) -> TrialOutcome | None:
        """The trial to start now; None:
        there is none, at least not before another one has ended.
        """

    def ended(self, outcome: TrialOutcome) -> None:
        """Take note of a trial that has finished, failed, stopped or been pruned."""

    def hopeless(self, outcome: TrialOutcome) -> bool:
        """Whether a running trial does so badly that it is not worth its time."""


class PlannedTrials:
    """The trials of a plan that are not finished, in its order."""

    def __init__(self, plan: StudyPlan, out: Path) -> None:
        self.outcomes = [TrialOutcome(trial, trial.folder(out)) for trial in plan.trials()]
        for outcome in self.outcomes:
            if (outcome.folder / DONE).exists():
                outcome.state = "finished"
        self._waiting = deque(outcome for outcome in self.outcomes if outcome.state == "waiting")

    def total(self) -> int:
        """See `TrialSource`."""
        return len(self.outcomes)

    def next(self) -> TrialOutcome | None:
        """See `TrialSource`."""
        return self._waiting.popleft() if self._waiting else None

    def ended(self, outcome: TrialOutcome) -> None:
        """See `TrialSource`."""

    def hopeless(self, outcome: TrialOutcome) -> bool:
        """See `TrialSource`: what is compared is trained to its end."""
        return False


@dataclass
class _Child:
    outcome: TrialOutcome
    job: Job
    device: str | None
    pruned: bool = False
    looked: float = field(default_factory=time.monotonic)


def run(plan: StudyPlan, out: Path, resources: Resources, console: Console) -> list[TrialOutcome]:
    """Train what is not trained yet of a plan, and return what became of all its trials."""
    trials = PlannedTrials(plan, out)
    run_trials(trials, Conditions(plan.data, plan.skip_bad), resources, console)
    return trials.outcomes


def run_trials(
    trials: TrialSource, conditions: Conditions, resources: Resources, console: Console
) -> None:
    """Train what the source gives.
    Ctrl-C and SIGTERM stop the trials, which save; a second one stops them at once.

    A trial that fails does not stop the others.
    """
    running: list[_Child] = []
    with sigterm_interrupts(), Board(trials.outcomes, trials.total, console) as board:
        try:
            _keep_busy(trials, running, conditions, resources, board)
        except KeyboardInterrupt:
            board.say("Stopping: the trials that run save first. Once more stops at once.")
            _stop(running, trials)
        finally:
            for child in running:
                child.job.kill()


def _keep_busy(
    trials: TrialSource,
    running: list[_Child],
    conditions: Conditions,
    resources: Resources,
    board: Board,
) -> None:
    """Start a trial wherever a device is free, until none is given and none runs."""
    free = resources.devices()
    while True:
        while free and (outcome := trials.next()) is not None:
            running.append(_start(outcome, conditions, resources, free.pop(0)))
            board.started(outcome)
        if not running:
            return
        for child, code in [(c, code) for c in running if (code := c.job.poll()) is not None]:
            running.remove(child)
            free.append(child.device)
            _settle(child, code)
            trials.ended(child.outcome)
            board.ended(child.outcome)
        for child in running:
            _prune(child, trials)
        board.refresh()
        time.sleep(POLL_SECONDS)


def _prune(child: _Child, trials: TrialSource) -> None:
    """Stop a trial that is hopeless, as Ctrl-C would."""
    now = time.monotonic()
    if child.pruned or now - child.looked < LOOK_SECONDS:
        return
    child.looked = now
    if trials.hopeless(child.outcome):
        child.pruned = True
        child.job.terminate()


def _start(
    outcome: TrialOutcome, conditions: Conditions, resources: Resources, device: str | None
) -> _Child:
    """Write a trial's order, and start it."""
    trial, folder, launcher = outcome.trial, outcome.folder, resources.launcher
    folder.mkdir(parents=True, exist_ok=True)
    order = {
        "recipe": trial.recipe.model_dump(mode="json"),
        "data": dict(conditions.data),
        "seed": trial.seed,
    }
    order |= {"format": FORMAT, "skip_bad": conditions.skip_bad, "device": device}
    order |= {"branch": trial.branch, "boxes": trial.boxes or None}
    order |= {"workers": resources.workers, "jobs": resources.jobs if launcher.here else 1}
    order |= {"track": list(resources.track)}
    replace_text(folder / ORDER, json.dumps(order, indent=1))
    job = launcher.start(folder, resources.threads_each())
    outcome.state = "running"
    return _Child(outcome, job, device)


def _settle(child: _Child, code: int) -> None:
    """Note in its outcome what became of a child that has ended, with its exit code."""
    outcome = child.outcome
    if (outcome.folder / DONE).exists():
        outcome.state = "finished"
    elif code in STOPPED:
        outcome.state = "pruned" if child.pruned else "stopped"
    else:
        outcome.state = "failed"
        lines = (outcome.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        outcome.log = "\n".join([*telling(lines), f"exit code {code}"])


def telling(lines: list[str]) -> list[str]:
    """The part of a failed trial's log that says why: it ends a little below the last exception, or
    at the end. Below an exception of CUDA there are pages of the interpreter's own frames."""
    named = [i for i, line in enumerate(lines) if EXCEPTION.match(line)]
    end = named[-1] + 1 + BELOW if named else len(lines)
    return lines[:end][-TAIL_LINES:]


def _stop(running: list[_Child], trials: TrialSource) -> None:
    """Let all children save and stop, and wait for them."""
    for child in running:
        child.job.terminate()
    for child in running:
        _settle(child, child.job.wait())
        trials.ended(child.outcome)
    running.clear()
