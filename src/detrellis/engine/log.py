"""The log of a run: records in `metrics.jsonl`, the same in trackers, and lines on the console.

Only the main process logs; a `RunLog` on any other process does nothing. Epochs and steps count
from 1, so a record's `step` is the number of steps done when it was written.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from PIL import Image
from rich.console import Console

from detrellis.atomic import replace_text
from detrellis.engine.console import TrainingView
from detrellis.engine.means import Means, Sums, Value
from detrellis.engine.trackers import Status, TrackedRun, Tracker, Trackers
from detrellis.terminal import Terminal

RECORD_EVERY = 20  # steps between two records

Clock = Callable[[], float]
Item = TypeVar("Item")


class Timer:
    """Seconds spent in named parts: `with timer.part("forward"): ...`.

    A part inside another one is taken off the outer one, so the parts never add up to more than the
    whole. On a GPU the work is queued, and its time shows in the part that waits for it.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of the `with` block to `name`."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields `items`, and adds the time spent waiting for each to `name`."""
        iterator, end = iter(items), object()
        while True:
            with self.part(name):
                item = next(iterator, end)
            if item is end:
                return
            yield item  # type: ignore[misc]

    def take(self) -> dict[str, float]:
        """The seconds by part since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _charge(self) -> None:
        """Gives the time since the last event to the innermost open part."""
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] = (
                self._seconds.get(self._open[-1], 0.0) + now - self._since
            )
        self._since = now


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line torn by a crash is left out."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        return [record for line in file if (record := _parse(line)) is not None]


class RunLog:
    """Records and shows one training run.

    `step`: steps done in the checkpoint that the run resumes from. Later records in the folder's
    `metrics.jsonl` belong to steps that are about to be done again, and are removed; 0 is a new run
    and removes all. Values are collected on their device, and copied to the host once in
    `RECORD_EVERY` steps, when a record is written. `trackers` get every record, too, and at the
    beginning `config`, which says what is trained.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        epochs: int,
        steps_per_epoch: int,
        step: int = 0,
        rank: int = 0,
        console: Console | None = None,
        clock: Clock = time.perf_counter,
        trackers: Sequence[Tracker] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.is_main_process = rank == 0
        self.status: Status = "stopped"  # what the trackers are told at the end
        self._epochs, self._steps, self._clock = epochs, steps_per_epoch, clock
        self._epoch, self._step, self._lr = step // max(1, steps_per_epoch), step, 0.0
        self._window, self._totals = Means(), Sums()
        self._images = self._window_images = 0
        self._epoch_start = self._window_start = self._last_step = clock()
        self._said: set[str] = set()
        if not self.is_main_process:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _RecordFile(folder / "metrics.jsonl", step)
        self._view = TrainingView(console or Terminal(), clock, epochs, steps_per_epoch, step)
        run = TrackedRun.of(folder, step, config or {})
        self._trackers = Trackers(trackers, run, self.say)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.status = self.status if kind is None else "failed"
        self.close()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar; nothing for an empty one."""
        if self.is_main_process and text:
            self._view.line(text)

    def start_epoch(self, epoch: int) -> None:
        """Begins epoch `epoch`, counted from 1."""
        self._epoch, self._images, self._window_images = epoch, 0, 0
        self._epoch_start = self._window_start = self._last_step = self._clock()
        if self.is_main_process:
            self._view.start_epoch(epoch)

    def step(
        self,
        step: int,
        losses: Mapping[str, Value],
        metrics: Mapping[str, Value] | None = None,
        *,
        total: Value,
        lr: float,
        images: int,
    ) -> None:
        """One optimizer step done: `losses` by name and their sum `total`.

        `metrics`, such as the matched IoU, may be NaN where a batch has nothing to measure.
        `images` are those of all processes in this step. Waits for the device only where it writes
        a record.
        """
        if not self.is_main_process:
            return
        self._step, self._lr, self._last_step = step, lr, self._clock()
        self._window.add({"loss": total, **losses}, metrics or {})
        self._images += images
        self._window_images += images
        self._view.advance(step)
        if step == 1 or step % RECORD_EVERY == 0:
            self._record_step()

    def end_epoch(
        self,
        seconds: Mapping[str, float] | None = None,
        stats: Mapping[str, float | None] | None = None,
        after_nms: Mapping[str, float | None] | None = None,
        resampled: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Records the epoch and prints its row: `Timer.take()`, and `EvalResult.stats` where there
        are any, also of the same detections after NMS; `resampled` is recorded:
        `EvalResult.resampled` of "eval" and of "after_nms"."""
        if not self.is_main_process:
            return
        now = self._clock()
        self._totals.add(self._window.take())
        losses, metrics = self._totals.means()
        self._totals = Sums()
        record = {
            **self._head("epoch", losses, metrics),
            "images_per_second": _rate(self._images, self._last_step - self._epoch_start),
            "seconds": {"total": now - self._epoch_start, **(seconds or {})},
            "eval": dict(stats) if stats is not None else None,
            "after_nms": dict(after_nms) if after_nms is not None else None,
            "resampled": {name: list(values) for name, values in resampled.items()}
            if resampled
            else None,
        }
        self._write(record)
        self._view.end_epoch(record)

    def track(self, items: Iterable[Item], name: str, total: int | None = None) -> Iterator[Item]:
        """Yields `items` with a progress bar of their own, on a terminal:
        the evaluation, for one.
        """
        return self._view.track(items, name, total) if self.is_main_process else iter(items)

    def state_dict(self) -> dict[str, Any]:
        """What the epoch has measured so far, as plain tensors, numbers and containers: its record
        is to hold all of the epoch, wherever the run is resumed. Times and rates are those of each
        process."""
        return {
            "window": self._window.state_dict(),
            "totals": self._totals.state_dict(),
            "lr": self._lr,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """The inverse of `state_dict`; nothing for None, of runs that did not save it."""
        if state is None:
            return
        self._window.load_state_dict(state["window"])
        self._totals.load_state_dict(state["totals"])
        self._lr = state["lr"]

    def picture(self, name: str, picture: Image.Image) -> None:
        """Gives a picture to the trackers."""
        if self.is_main_process:
            self._trackers.picture(name, picture, self._step)

    def close(self) -> None:
        """Takes the progress bar away, closes the files and ends the trackers;
        twice is as good as once.
        """
        if not self.is_main_process:
            return
        self._view.close()
        with contextlib.suppress(OSError):  # said when it was first met
            self._file.close()
        self._trackers.end(self.status)

    def _record_step(self) -> None:
        window = self._window.take()
        self._totals.add(window)
        losses, metrics = window.means()
        now = self._clock()
        rate = _rate(self._window_images, now - self._window_start)
        self._window_images, self._window_start = 0, now
        record = {**self._head("step", losses, metrics), "images_per_second": rate}
        self._write(record)
        self._view.show(record)

    def _head(
        self, kind: str, losses: dict[str, float], metrics: dict[str, float]
    ) -> dict[str, Any]:
        total = losses.pop("loss", math.nan)
        where = {
            "kind": kind,
            "epoch": self._epoch,
            "step": self._step,
            "time": round(time.time(), 3),
        }
        return {**where, "loss": total, "lr": self._lr, "losses": losses, "metrics": metrics}

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(record)
        except OSError as error:
            # What was not written comes with the next record.
            self._say_once(
                f"metrics.jsonl cannot be written now ({error.strerror}). The run goes on."
            )
        prefix = "" if record["kind"] == "step" else "epoch/"
        logged = {k: v for k, v in record.items() if k not in ("kind", "step", "time", "resampled")}
        self._trackers.metrics(
            {prefix + name: value for name, value in _flat(logged)}, record["step"]
        )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)


class _RecordFile:
    """One JSON object a line. Opening it removes what the resumed run will write again."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._kept: set[tuple[str, int]] = set()
        self._waiting: dict[tuple[str, int], str] = {}  # lines that there was no room for
        if path.exists():
            self._keep(lambda record: int(record["step"]) <= step)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends the record at once, whole, as strict JSON;
        before it those that could not be written when it was their turn.
        """
        self._waiting[_key(record)] = json.dumps(_strict(record), allow_nan=False) + "\n"
        self._write_waiting()

    def close(self) -> None:
        """Closes the file of records."""
        if self._file.closed:
            return
        try:
            if self._waiting:
                self._write_waiting()
        finally:
            self._file.close()

    def _write_waiting(self) -> None:
        again = self._kept & self._waiting.keys()
        if again:  # an epoch whose evaluation is done again after the resume
            self._keep(lambda old: _key(old) not in again)
            old_file, self._file = self._file, self._path.open("ab", buffering=0)
            old_file.close()
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._append("".join(self._waiting.values()).encode())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)  # or what comes next would follow half a line
            raise
        self._waiting.clear()

    def _append(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:
            rest = rest[self._file.write(rest) :]
        # A state that follows it never knows of records that a power cut has taken
        os.fsync(self._file.fileno())

    def _keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        records = [r for r in read_records(self._path) if wanted(r)]
        replace_text(self._path, "".join(json.dumps(r) + "\n" for r in records))
        self._kept = {_key(r) for r in records}


def _key(record: Mapping[str, Any]) -> tuple[str, int]:
    kind = str(record["kind"])
    return kind, int(record["epoch" if kind == "epoch" else "step"])


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {name: _strict(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """("losses/main/class/5", 0.3), ...: every number in nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None and math.isfinite(value):
            yield prefix + name, float(value)


def _rate(images: int, seconds: float) -> float | None:
    return images / seconds if seconds > 0 and images else None
