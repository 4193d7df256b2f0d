"""Trains a plan: each trial in a process of its own, several at a time, until all are done or somebody stops them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from detrellis.atomic import replace_text
from detrellis.recipes.migrate import FORMAT
from detrellis.signals import sigterm_interrupts
from detrellis.study.board import Board
from detrellis.study.plan import DONE, LOG, ORDER, StudyPlan, TrialOutcome

CHILD = ("-m", "detrellis.study.child")
POLL_SECONDS = 0.3
TAIL_LINES, BELOW = 12, 2  # of a failed trial's log, and of them below the exception
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM)  # the last before its first step
EXCEPTION = re.compile(r"[\w.]+(Error|Exception)\b")


@dataclass(frozen=True)
class Resources:
    """What the trials run on, which decides how fast; it changes what is trained by no more than rounding."""

    jobs: int = 1  # trials at a time
    threads: int | None = None  # CPU threads of all together; None: OMP_NUM_THREADS for each, or all there are
    workers: int = 1  # processes that load images, of each trial
    device: str | None = None  # several with commas: trials are dealt out to them

    def devices(self) -> list[str | None]:
        """The device of each job that runs at the same time."""
        given = [None] if self.device is None else [d.strip() for d in self.device.split(",")]
        return [given[i % len(given)] for i in range(self.jobs)]

    def threads_each(self) -> int | None:
        """The CPU threads of a trial; None: as the environment says."""
        if self.threads is None and "OMP_NUM_THREADS" in os.environ:
            return None
        return max(1, (self.threads or os.cpu_count() or 1) // self.jobs)


@dataclass
class _Child:
    outcome: TrialOutcome
    process: subprocess.Popen[bytes]
    device: str | None


def run(plan: StudyPlan, out: Path, resources: Resources, console: Console) -> list[TrialOutcome]:
    """Train what is not trained yet. Ctrl-C and SIGTERM stop the trials, which save; a second one stops them at once.

    A trial that fails does not stop the others.
    """
    outcomes = [TrialOutcome(trial, trial.folder(out)) for trial in plan.trials()]
    for outcome in outcomes:
        if (outcome.folder / DONE).exists():
            outcome.state = "finished"
    running: list[_Child] = []
    with sigterm_interrupts(), Board(outcomes, console) as board:
        try:
            _keep_busy(outcomes, running, plan, resources, board)
        except KeyboardInterrupt:
            board.say("Stopping: the trials that run save first. Once more stops at once.")
            _stop(running)
        finally:
            for child in running:
                child.process.kill()
    return outcomes


def _keep_busy(
    outcomes: list[TrialOutcome], running: list[_Child], plan: StudyPlan, resources: Resources, board: Board
) -> None:
    """Start a trial wherever a device is free, until none waits and none runs."""
    waiting = deque(outcome for outcome in outcomes if outcome.state == "waiting")
    free = resources.devices()
    while waiting or running:
        while waiting and free:
            running.append(_start(waiting.popleft(), plan, resources, free.pop(0)))
            board.started(running[-1].outcome)
        for child in [c for c in running if c.process.poll() is not None]:
            running.remove(child)
            free.append(child.device)
            _settle(child)
            board.ended(child.outcome)
        board.refresh()
        time.sleep(POLL_SECONDS)


def _start(outcome: TrialOutcome, plan: StudyPlan, resources: Resources, device: str | None) -> _Child:
    """Start a trial, in a session of its own: a Ctrl-C in the terminal reaches this process alone, which then tells
    each child once."""
    trial, folder = outcome.trial, outcome.folder
    folder.mkdir(parents=True, exist_ok=True)
    order = {"recipe": trial.recipe.model_dump(mode="json"), "data": dict(plan.data), "seed": trial.seed}
    order |= {"format": FORMAT, "skip_bad": plan.skip_bad, "device": device}
    order |= {"workers": resources.workers, "jobs": resources.jobs}
    replace_text(folder / ORDER, json.dumps(order, indent=1))
    threads = resources.threads_each()
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *CHILD, str(folder)],
            stdin=subprocess.PIPE,  # its end tells the child that this process is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    outcome.state = "running"
    return _Child(outcome, process, device)


def _settle(child: _Child) -> None:
    """Note in its outcome what became of a child that has ended."""
    outcome, code = child.outcome, child.process.returncode
    if (outcome.folder / DONE).exists():
        outcome.state = "finished"
    elif code in STOPPED:
        outcome.state = "stopped"
    else:
        outcome.state = "failed"
        lines = (outcome.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        outcome.log = "\n".join([*telling(lines), f"exit code {code}"])


def telling(lines: list[str]) -> list[str]:
    """The part of a failed trial's log that says why: it ends a little below the last exception, or at the end. Below
    an exception of CUDA there are pages of the interpreter's own frames."""
    named = [i for i, line in enumerate(lines) if EXCEPTION.match(line)]
    end = named[-1] + 1 + BELOW if named else len(lines)
    return lines[:end][-TAIL_LINES:]


def _stop(running: list[_Child]) -> None:
    """Let all children save and stop, and wait for them."""
    for child in running:
        child.process.terminate()
    for child in running:
        child.process.wait()
        _settle(child)
    running.clear()
