"""Trackers: where the numbers and pictures of a run go besides `metrics.jsonl`.

Each works in a thread of its own and gets what is logged through a queue, so one that fails, hangs
or loses its server costs a warning and nothing else; one that is slow catches up. The ids of the
runs that trackers have begun stand in `trackers.json`, and a resumed run goes on in the same ones.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image

from detrellis.atomic import replace_text
from detrellis.errors import UserError

IDS = "trackers.json"  # in a run's folder: the id of each tracker's run
ORDER = "trial.json"  # in that of a study's run, STUDY/ROW/seed-S: what the study wants of it
START_SECONDS = 30.0  # a tracker may take to begin, while the run waits for it
END_SECONDS = 60.0  # and to send what it still has, after the last step
WAITING = 10_000  # calls in a queue; a tracker that leaves more of them undone hangs

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it begins, or goes on."""

    folder: Path
    name: str
    step: int  # optimizer steps done: 0 is a new run
    config: Mapping[str, Any]  # recipe, seed and version as JSON holds them; no paths
    study: str | None = None  # the name of the study's folder, where the run is a part of one

    @classmethod
    def of(cls, folder: Path, step: int, config: Mapping[str, Any]) -> TrackedRun:
        """The run in `folder`, called by its last two parts: in a study, the row and the seed."""
        place = folder.absolute()
        study = place.parent.parent.name if (place / ORDER).exists() else None
        return cls(folder, "-".join(place.parts[-2:]), step, config, study)


@runtime_checkable
class Tracker(Protocol):
    """What `train(track=...)` takes, besides the names of those that are known.

    All calls come from one thread, one after the other. What one of them raises ends the tracking,
    and not the run; a `UserError` is told in its own words.
    """

    name: str
    remedy: str  # what to do where it fails

    def start(self, run: TrackedRun, resume: str | None) -> str | None:
        """Begin, or go on with the run of the id `resume`;
        returns the id to go on with another time.
        """

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, such as `losses/main/class/5`, after `step` optimizer steps;
        none is NaN.
        """

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """One RGB picture."""

    def end(self, status: Status) -> None:
        """Send what is left. Not called where the process was killed."""


class Trackers:
    """All trackers of one run. No call raises, and only the beginning and the end wait for them."""

    def __init__(
        self, trackers: Sequence[Tracker], run: TrackedRun, say: Callable[[str], None]
    ) -> None:
        self._file, self._writing = run.folder / IDS, threading.Lock()
        self._ids = read_ids(run.folder) if run.step else {}
        self._workers = [_Worker(tracker, say) for tracker in trackers]
        begun = [
            (worker, worker.put(partial(self._begin, worker.tracker, run)))
            for worker in self._workers
        ]
        until = time.monotonic() + START_SECONDS
        for worker, done in begun:
            worker.wait(done, until, f"has not begun within {START_SECONDS:.0f} s")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers, none of them NaN."""
        for worker in self._workers:
            worker.put(partial(worker.tracker.log_metrics, values, step))

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture."""
        for worker in self._workers:
            worker.put(partial(worker.tracker.log_picture, name, picture, step))

    def end(self, status: Status) -> None:
        """End all of them, and wait for what they still have to send."""
        ended = [
            (worker, worker.put(partial(worker.tracker.end, status))) for worker in self._workers
        ]
        until = time.monotonic() + END_SECONDS
        for worker, done in ended:
            worker.wait(done, until, f"has not sent all it has within {END_SECONDS:.0f} s")
        self._workers = []

    def _begin(self, tracker: Tracker, run: TrackedRun) -> None:
        """Begin a tracker, in its thread, and note the id of its run."""
        id_ = tracker.start(run, self._ids.get(tracker.name))
        if id_ is not None:
            with self._writing:
                self._ids[tracker.name] = id_
                replace_text(self._file, json.dumps(self._ids, indent=1))


def read_ids(folder: Path) -> dict[str, str]:
    """The ids of the trackers' runs by the trackers' names;
    none where the file is missing or damaged.
    """
    try:
        ids = json.loads((folder / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(id_) for name, id_ in ids.items()} if isinstance(ids, dict) else {}


class _Worker:
    """One tracker and its thread; after the first failure nothing is sent to it any more."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None]) -> None:
        self.tracker, self._say = tracker, say
        self._error: BaseException | None = None
        self._lost = self._warned = False
        self._calls: queue.Queue[tuple[Callable[[], object], threading.Event]] = queue.Queue(
            WAITING
        )
        threading.Thread(target=self._work, name=f"tracker {tracker.name}", daemon=True).start()

    def put(self, call: Callable[[], object]) -> threading.Event:
        """Let the thread make the call after those before it; the event is set when it is over."""
        done = threading.Event()
        if self._error is not None:
            self._fail(self._error)
        if self._lost:
            done.set()
            return done
        try:
            self._calls.put_nowait((call, done))
        except queue.Full:
            self._lost = True
            self._warn("does not take what it is given")
            done.set()
        return done

    def wait(self, done: threading.Event, until: float, late: str) -> None:
        """Wait for a call, but not for ever."""
        in_time = done.wait(max(0.0, until - time.monotonic()))
        if self._error is not None:
            self._fail(self._error)
        elif not in_time:
            self._warn(late)

    def _work(self) -> None:
        while True:
            call, done = self._calls.get()
            try:
                if self._error is None and not self._lost:
                    call()
            except BaseException as error:
                # Whatever a library raises, SystemExit included, is no reason to stop.
                self._error = error
            done.set()

    def _fail(self, error: BaseException) -> None:
        """Nothing is sent to it from here on."""
        self._lost = True
        if isinstance(error, UserError):
            self._warn(error.message, error.remedy)
            return
        reason = " ".join(str(error).split())[:200]
        self._warn(f"failed ({type(error).__name__}{': ' if reason else ''}{reason})")

    def _warn(self, why: str, remedy: str = "") -> None:
        """Say what is wrong; once, whatever comes after it."""
        if not self._warned:
            self._warned = True
            going_on = "The run goes on without it." if self._lost else "The run goes on."
            self._say(
                f"warning {self.tracker.name} {why}. {going_on} {remedy or self.tracker.remedy}"
            )
