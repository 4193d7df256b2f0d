"""Where the trials of a study run:
in processes of this machine, or as the jobs of a cluster (`cluster.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from detrellis.signals import handled
from detrellis.study.plan import LOG

CHILD = ("-m", "detrellis.study.child")
POLL_SECONDS = 0.3


class Job(Protocol):
    """A trial that has been started: what `subprocess.Popen` has of it."""

    def poll(self) -> int | None:
        """The exit code of the trial's process; None while it waits for a machine, or runs."""

    def wait(self) -> int:
        """The exit code, once the trial has ended."""

    def terminate(self) -> None:
        """Let it save and stop; one that waits for a machine never begins."""

    def kill(self) -> None:
        """Stop it at once."""


class Launcher(Protocol):
    """Starts trials somewhere, each from the order in its folder."""

    @property
    def here(self) -> bool:
        """Whether trials that run at a time share this machine."""

    def start(self, folder: Path, threads: int | None) -> Job:
        """Start the trial of a folder, on so many CPU threads (None: as its environment says)."""


class Local:
    """A process of this machine for each trial."""

    here = True

    def start(self, folder: Path, threads: int | None) -> Job:
        """See `Launcher`."""
        return start_child(folder, CHILD, threads)


def start_child(
    folder: Path, arguments: Sequence[str], threads: int | None
) -> subprocess.Popen[bytes]:
    """The process that trains a trial, in a session of its own: a Ctrl-C in the terminal reaches
    this process alone, which then tells the child once."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *arguments, str(folder)],
            stdin=subprocess.PIPE,  # its end tells the child that this process is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )


@dataclass
class TrialJob:
    """What a job of a cluster runs, on whatever machine it gets:
    a trial in a process below its own.

    So that the trial can save first, whatever ends the job: SIGTERM is passed on to it, a cancelled
    task is a `KeyboardInterrupt` here, and before a preemption or the end of its time submitit
    calls `checkpoint`.
    """

    folder: Path
    arguments: Sequence[str] = field(default_factory=lambda: CHILD)

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Train the trial to its end; the exit code of its process."""
        with handled(self._pass_on, (signal.SIGTERM,)):
            # Slurm may send submitit's signal to all processes of a job, and one that does not know
            # it would end.
            masked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2,))
            try:
                self._process = start_child(self.folder, self.arguments, None)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            try:
                while (code := self._process.poll()) is None:
                    time.sleep(POLL_SECONDS)
            except BaseException:
                self.save_and_stop()
                raise
        return code

    def checkpoint(self) -> Any:
        """What submitit runs when the job has been requeued: the same trial, which goes on."""
        from submitit.helpers import DelayedSubmission

        self.save_and_stop()
        return DelayedSubmission(TrialJob(self.folder, self.arguments))

    def save_and_stop(self) -> None:
        """Let the trial save, and wait for it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._process is not None:
            self._process.send_signal(number)
