"""Training in a process that ends itself with SIGKILL in the middle of what it does,
at the Nth of its moments.

A moment is a step before or after its update, a batch of an evaluation, and each part of writing a
file: half of it written, whole and not yet on the disk, on the disk and not yet in its place, in
its place.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import detrellis
from detrellis.distributed import TIMEOUT
from detrellis.engine import checkpoint, evaluate, log
from detrellis.engine.log import read_records
from detrellis.errors import UserError

from .test_distributed import environment, free_port
from .test_resume import assert_same_run

REFUSED = 2  # exit code
TIMES = ("time", "seconds", "images_per_second")  # of a record: what no two runs have in common


class Moments:
    """Counts the moments of this process, and kills it in the `at`-th;
    or the disk is `full` there.
    """

    def __init__(self, at: int | None, told: Path, full: bool) -> None:
        self.at, self.told, self.full, self.names = at, told, full, list[str]()

    def happen(self, name: str, half: Callable[[], object] = lambda: None) -> None:
        """A moment passes; `half` is what a process that ends in it has done."""
        self.names.append(name)
        if len(self.names) == self.at:
            half()
            self.told.write_text(json.dumps(self.names))
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Replace what training calls by what also counts."""
        for place, name in ((torch, "save"), (checkpoint, "save_file")):
            self._before(
                place,
                name,
                f"half of a {name}",
                lambda own, *args: (own(*args), _cut(Path(args[1]))),
            )
        self._before(os, "fsync", "written, and not on the disk")
        for name in ("replace", "link"):
            self._before(os, name, "a file before it takes its place")
            self._after(os, name, "a file in its place")
        self._before(torch.nn.utils, "clip_grad_norm_", "in a step")
        self._after(log.RunLog, "step", "after a step")
        self._before(evaluate.CocoEvaluator, "update", "in an evaluation")
        self._before(
            log._RecordFile,
            "_append",
            "half of a record",
            lambda _, file, lines: file._file.write(lines[: len(lines) // 2]),
        )

    def _before(
        self, place: Any, name: str, moment: str, half: Callable[..., object] = lambda *_: None
    ) -> None:
        own = getattr(place, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.happen(moment, lambda: half(own, *args))
            return own(*args, **kwargs)

        setattr(place, name, counted)

    def _after(self, place: Any, name: str, moment: str) -> None:
        own = getattr(place, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            self.happen(moment)
            return result

        setattr(place, name, counted)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def go_on(
    at: int | None,
    told: Path,
    data: Path,
    out: Path,
    settings: Sequence[str],
    epochs: int,
    full: bool = False,
) -> None:
    """In a process of its own: start the run, or go on with it, up to the moment."""
    torch.set_num_threads(1)
    moments = Moments(at, told, full)
    moments.watch()
    try:
        if (out / "last.state.pt").exists():
            detrellis.resume(out, workers=0, device="cpu")
        else:
            run: dict[str, Any] = {"override": settings, "epochs": epochs}
            detrellis.train("tiny", data=data, out=out, workers=0, device="cpu", **run)
        told.write_text(json.dumps(moments.names))
    except UserError as error:
        told.write_text(json.dumps([*moments.names, str(error)]))
        sys.exit(REFUSED)


def trained(at: int | None, told: Path, *run: Any) -> str | None:
    """Train in a process of its own; the name of the moment in which it was killed, or the error
    with which it ended; None where it came to its end."""
    # Forked from one that has imported all this
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload", __name__])
    process = context.Process(target=go_on, args=(at, told, *run))
    process.start()
    process.join(600)
    assert process.exitcode in (0, REFUSED, -signal.SIGKILL)
    return json.loads(told.read_text())[-1] if process.exitcode else None


def trained_by_two(at: int | None, rank: int, told: Path, *run: Any) -> str | None:
    """As `trained`, by two processes (gloo), of which that `rank` is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload", __name__])
    port, words = free_port(), [told.with_name(f"{told.name}.{i}") for i in range(2)]
    processes = [
        context.Process(target=_one_of_two, args=(i, port, at if i == rank else None, word, *run))
        for i, word in enumerate(words)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    ends = [process.exitcode for process in processes]
    # The other ends with words, or has nothing left to do with the one that is killed
    assert ends[1 - rank] in (0, REFUSED), ends
    assert ends[rank] == -signal.SIGKILL or ends == [0, 0], (ends, words[rank].read_text())
    return json.loads(words[rank].read_text())[-1] if ends[rank] else None


def _one_of_two(rank: int, port: int, *arguments: Any) -> None:
    os.environ |= environment(rank, 2, port) | {TIMEOUT: "300"}
    go_on(*arguments)


def assert_never_killed(one: Path, other: Path) -> None:
    """The same end bit for bit: states, weights, every record of the log, and the report."""
    assert_same_run(one, other)
    logs = [read_records(run / "metrics.jsonl") for run in (one, other)]
    first, second = (
        [{k: v for k, v in r.items() if k not in TIMES} for r in records] for records in logs
    )
    assert first == second
    for name in ("result", "diagnosis", "epoch", "step"):
        first, second = (
            json.loads((run / "report.json").read_text())[name] for run in (one, other)
        )
        assert (
            {**first, "report": 0} == {**second, "report": 0}
            if name == "result"
            else first == second
        ), name
    assert not list(other.rglob(".*.partial"))
