"""Four processes of one run (gloo):
one is lost, stands still or sees no boxes, and nobody waits for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import detrellis
from detrellis.distributed import TIMEOUT
from detrellis.engine.log import RunLog, read_records
from detrellis.engine.train import TrainRun
from detrellis.errors import UserError
from detrellis.types import Targets

from ..engine.test_distributed import environment, free_port, quiet
from ..engine.test_resume import assert_same_run
from ..engine.test_saving import SETTINGS

SIZE, EPOCHS = 4, 2  # processes, epochs
# Seconds: that processes wait where nobody has to (on a busy machine one may begin a minute after
# another), that they wait for one that stands still, and that it does.
WAIT, BRIEF, STILL = 600, 40, 60
FOUR = [*SETTINGS, "optim.batch_size=4", "optim.accumulate=1"]


def member(
    rank: int,
    port: int,
    size: int,
    act: Callable[[], object] | None,
    wait: int,
    data: Path,
    out: Path,
) -> None:
    """One process of the run: it acts first, and writes down with what it ended."""
    os.environ |= environment(rank, size, port) | {TIMEOUT: str(wait)}
    torch.set_num_threads(1)
    if act is not None:
        act()
    said = out.with_name(f"{out.name}.{rank}")
    said.unlink(missing_ok=True)
    try:
        if (out / "last.state.pt").exists():
            detrellis.resume(out, workers=0, device="cpu", console=quiet())
        else:
            settings = {
                "override": FOUR,
                "epochs": EPOCHS,
                "workers": 0,
                "device": "cpu",
                "console": quiet(),
            }
            detrellis.train("tiny", data=data, out=out, **settings)
        said.write_text("finished")
    except UserError as error:
        said.write_text(str(error))


def start(
    data: Path, out: Path, size: int = SIZE, acting: int = -1, act: Any = None, wait: int = WAIT
) -> list[Any]:
    """The processes, of which one does something else;
    `wait` is how many seconds they wait for each other.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    port = free_port()
    arguments = [
        (rank, port, size, act if rank == acting else None, wait, data, out) for rank in range(size)
    ]
    processes = [context.Process(target=member, args=given) for given in arguments]
    for process in processes:
        process.start()
    return processes


def ends(out: Path, processes: list[Any], but: int = -1) -> list[str]:
    """Wait for all processes, or all but one, and return what they ended with."""
    others = [rank for rank in range(len(processes)) if rank != but]
    for rank in others:
        processes[rank].join(900)
        assert processes[rank].exitcode == 0, f"process {rank}: {processes[rank].exitcode}"
    return [out.with_name(f"{out.name}.{rank}").read_text() for rank in others]


def at_step(wanted: int, number: int) -> None:
    """This process gets a signal right after that step."""
    log_step = RunLog.step

    def step(self: RunLog, step: int, *args: Any, **kwargs: Any) -> None:
        log_step(self, step, *args, **kwargs)
        if step == wanted:
            os.kill(os.getpid(), number)

    RunLog.step = step  # type: ignore[method-assign]


def dies() -> None:
    at_step(5, signal.SIGKILL)


def dies_early() -> None:
    at_step(1, signal.SIGKILL)


def stands_still() -> None:
    at_step(4, signal.SIGSTOP)


def sees_no_boxes() -> None:
    """In the first epoch."""
    forward = TrainRun._forward_backward

    def without(self: TrainRun, batch: Any, weight: float) -> Any:
        if self.state.epoch == 0:
            none = Targets(
                batch.targets.labels[:0], batch.targets.boxes[:0], (0,) * len(batch.targets.sizes)
            )
            batch = batch._replace(targets=none)
        return forward(self, batch, weight)

    TrainRun._forward_backward = without  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of four processes that all do what they should."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert ends(out, start(shapes, out)) == ["finished"] * SIZE
    return out


@pytest.mark.parametrize("rank", [0, 2])
def test_one_of_four_dies(shapes: Path, whole: Path, tmp_path: Path, rank: int) -> None:
    """The others say so and how to go on, and the run ends as if nothing had been."""
    out = tmp_path / "run"
    for act in (dies_early, dies):
        told = ends(out, start(shapes, out, SIZE, rank, act), but=rank)
        assert all("another process has ended" in text and "--resume" in text for text in told), (
            told
        )
    assert ends(out, start(shapes, out)) == ["finished"] * SIZE
    assert_same_run(whole, out)
    logs = [[r["losses"] for r in read_records(run / "metrics.jsonl")] for run in (whole, out)]
    assert logs[0] == logs[1]


def test_one_of_two_dies(shapes: Path, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "run"
    assert ends(alone, start(shapes, alone, 2)) == ["finished"] * 2
    ends(out, start(shapes, out, 2, 1, dies), but=1)
    assert ends(out, start(shapes, out, 2)) == ["finished"] * 2
    assert_same_run(alone, out)


def test_one_of_four_stands_still(shapes: Path, whole: Path, tmp_path: Path) -> None:
    """For longer than the others wait: they end, and so does it once it goes on."""
    out, began = tmp_path / "run", time.monotonic()
    processes = start(shapes, out, SIZE, 3, stands_still, BRIEF)
    told = ends(out, processes, but=3)
    assert all(f"has not answered for {BRIEF} seconds" in text for text in told), told
    time.sleep(max(0.0, began + STILL - time.monotonic()))
    os.kill(processes[3].pid, signal.SIGCONT)
    assert "another process has ended" in ends(out, processes)[3]
    assert ends(out, start(shapes, out)) == ["finished"] * SIZE
    assert_same_run(whole, out)


def test_one_of_four_sees_no_boxes_for_an_epoch(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert ends(out, start(shapes, out, SIZE, 3, sees_no_boxes)) == ["finished"] * SIZE
    rows = [r for r in read_records(out / "metrics.jsonl") if r["kind"] == "epoch"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["loss"] > 0 for row in rows)


def test_unequal_shares_are_evaluated_as_in_one_process(
    shapes: Path, whole: Path, tmp_path: Path
) -> None:
    """Five pictures in four processes, two in one of them:
    the figures are the same bits as those of one process.
    """
    context, port = multiprocessing.get_context("forkserver"), free_port()
    processes = [
        context.Process(target=evaluated, args=(rank, port, whole, tmp_path / f"{rank}.txt"))
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(900)
        assert process.exitcode == 0
    torch.set_num_threads(1)
    alone = detrellis.evaluate(
        whole, batch_size=1, workers=0, device="cpu", report=tmp_path / "report"
    )
    assert alone.images == 5
    for rank in range(SIZE):
        assert (tmp_path / f"{rank}.txt").read_text() == repr(alone.stats)


def evaluated(rank: int, port: int, run: Path, out: Path) -> None:
    """In one of the processes."""
    os.environ |= environment(rank, SIZE, port)
    torch.set_num_threads(1)
    report = out.with_suffix("")
    result = detrellis.evaluate(run, batch_size=1, workers=0, device="cpu", report=report)
    out.write_text(repr(result.stats))
