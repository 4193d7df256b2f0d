"""Trials in processes of their own: several at a time, failing, stopped, resumed."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import detrellis
from detrellis.data.layout import resolve
from detrellis.engine.log import read_records
from detrellis.engine.outcome import TrainResult
from detrellis.engine.trackers import ORDER
from detrellis.errors import UserError
from detrellis.signals import sigterm_interrupts
from detrellis.study import child, launch, run
from detrellis.study.conduct import conduct, to_dict
from detrellis.study.plan import DONE, TrialOutcome
from detrellis.study.rows import plan_schemes
from detrellis.study.run import Resources

from ..small import SMALL
from .trials import finish, make_plan

# Stands in for a training: says what it was given, then does what its seed says.
STUB = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
order = json.loads((folder / "trial.json").read_text())
print("threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if order["seed"] == 1:
    sys.exit("boom")
if order["seed"] == 2:
    (folder / "started").touch()
    time.sleep(60)
(folder / "done.json").write_text(json.dumps({"device": order["device"]}))
"""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHILD", ("-c", STUB))
    monkeypatch.setattr(run, "POLL_SECONDS", 0.02)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.usefixtures("stub")
def test_a_failure_does_not_stop_the_others_and_shows_its_log(tmp_path: Path) -> None:
    plan = make_plan({"none": None, "align": None}, seeds=(0, 1))
    speaks = quiet()
    resources = Resources(jobs=2, threads=6, device="cpu, cuda:1", track=("mlflow",))
    found = run.run(plan, tmp_path, resources, speaks)
    assert [o.state for o in found] == ["finished", "finished", "failed", "failed"]
    assert "boom" in found[2].log
    assert "exit code 1" in found[2].log
    assert "none, seed 1: failed" in speaks.file.getvalue()  # type: ignore[attr-defined]
    devices = {json.loads((o.folder / DONE).read_text())["device"] for o in found[:2]}
    assert devices == {"cpu", "cuda:1"}
    assert "threads 3" in (found[0].folder / "console.log").read_text()
    assert json.loads((found[0].folder / ORDER).read_text())["track"] == ["mlflow"]


@pytest.mark.usefixtures("stub")
def test_what_is_finished_is_not_run_again_and_what_failed_is(tmp_path: Path) -> None:
    plan = make_plan({"none": None}, seeds=(0, 1))
    finish(plan.trials()[0].folder(tmp_path), [10.0, 20.0])
    found = run.run(plan, tmp_path, Resources(), quiet())
    assert [o.state for o in found] == ["finished", "failed"]
    assert not (found[0].folder / ORDER).exists()
    assert (found[1].folder / "console.log").read_text().count("boom") == 1
    run.run(plan, tmp_path, Resources(), quiet())
    assert (found[1].folder / "console.log").read_text().count("boom") == 2


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_children(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan({"none": None, "align": None}, seeds=(2,))
    folder = plan.trials()[0].folder(tmp_path)
    sleep = run.time.sleep

    def watch(seconds: float) -> None:
        if (folder / "started").exists():
            os.kill(os.getpid(), number)
        sleep(seconds)

    monkeypatch.setattr(run.time, "sleep", watch)
    before = signal.getsignal(signal.SIGTERM)
    # A job in the background ignores it
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = run.run(plan, tmp_path, Resources(jobs=1), quiet())
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert [o.state for o in found] == ["stopped", "waiting"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_handler_of_the_caller_stays() -> None:
    """The command line's remembers the signal, for the exit code."""
    heard: list[int] = []

    def note(number: int, frame: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, note)
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Resources(jobs=3, threads=8).threads_each() == 2
    assert Resources(jobs=3, threads=1).threads_each() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Resources(jobs=2).threads_each() is None  # it stays
    assert Resources(jobs=2, threads=4).threads_each() == 2


def test_what_a_failed_log_tells() -> None:
    above, frames = [f"line {i}" for i in range(30)], [f"frame #{i}: Error" for i in range(30)]
    told = run.telling([*above, "torch.AcceleratorError: CUDA error", "Search for it", "", *frames])
    assert told == [*above[-9:], "torch.AcceleratorError: CUDA error", "Search for it", ""]
    assert run.telling(above) == above[-12:]
    assert run.telling([*above, "ValueError: no"]) == [*above[-11:], "ValueError: no"]


def test_a_child_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(child.os, "read", lambda *_: b"")
    monkeypatch.setattr(child.os, "kill", lambda *what: asked.append(what))
    child._stop_with_parent()
    assert asked == [(os.getpid(), signal.SIGTERM)]


def test_a_child_tells_what_its_user_can_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order = {
        "recipe": {"name": "x", "optim": {"lr": -1}},
        "data": {"kind": "coco", "splits": {}},
        "seed": 0,
    }
    (tmp_path / ORDER).write_text(
        json.dumps(order | {"device": "cpu", "workers": 0, "jobs": 1, "skip_bad": False})
    )
    monkeypatch.setattr(child, "_stop_with_parent", lambda: None)
    assert child.main(tmp_path) == 2
    assert "optim.lr" in capsys.readouterr().out
    assert not (tmp_path / DONE).exists()


def test_a_child_trains_with_the_boxes_of_its_order(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan({"none": None, "boxes": None}, seeds=(0,))
    rows = (plan.rows[0], replace(plan.rows[1], boxes="/runs/of-coco"))
    asked: list[object] = []

    class Started:
        """What starts nothing."""

        here = True

        def start(self, folder: Path, threads: int | None) -> Any:
            raise UserError(str(folder))

    for trial in replace(plan, rows=rows).trials():
        outcome = TrialOutcome(trial, tmp_path / trial.row)
        with pytest.raises(UserError):
            run._start(
                outcome,
                run.Conditions(resolve(shapes).to_dict()),
                run.Resources(launcher=Started()),
                None,
            )  # type: ignore[arg-type]

        def train(*_: object, boxes: str | None, **options: object) -> None:
            asked.append(boxes)
            raise UserError("enough")

        monkeypatch.setattr(child.api, "train", train)
        monkeypatch.setattr(child, "_stop_with_parent", lambda: None)
        assert child.main(outcome.folder) == 2
    assert asked == [None, "/runs/of-coco"]


@pytest.mark.parametrize(
    ("number", "code"), [(None, 0), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_child_that_was_stopped_has_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, code: int
) -> None:
    (tmp_path / ORDER).write_text(json.dumps({"device": "cpu", "workers": 0, "jobs": 1}))
    (tmp_path / "last.state.pt").touch()
    result = TrainResult(tmp_path, 1, 3, 1.0, None, None, number is None, number)
    monkeypatch.setattr(child.api, "resume", lambda *_, **__: result)
    monkeypatch.setattr(child, "_stop_with_parent", lambda: None)
    assert child.main(tmp_path) == code
    assert (tmp_path / DONE).exists() == (number is None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the children have: sums are rounded in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_stopped_and_resumed_is_the_same_study(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real runs: the first row is stopped after its first steps;
    the AP is that of runs that nobody stopped.
    """
    settings = [*SMALL, "data.size=[64, 64]", "optim.batch_size=1", "optim.lr=1e-3"]
    plan = plan_schemes(
        "tiny", "none,align", resolve(shapes), seeds=(0,), epochs=1, override=settings
    )
    how, out = {"threads": 1, "workers": 0, "device": "cpu"}, tmp_path / "out"
    log, sleep = plan.trials()[0].folder(out) / "metrics.jsonl", run.time.sleep

    def interrupt(seconds: float) -> None:
        if log.exists() and read_records(log):
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(run, "POLL_SECONDS", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(run.time, "sleep", interrupt)
        first = conduct(plan, out, **how, console=quiet())
    assert [o.trial.row for o in first.unfinished][-1] == "align"
    assert "Not in the figures" in (out / "report.html").read_text()

    found = conduct(plan, out, **how, console=quiet())
    assert [line.name for line in found.rows] == ["none", "align"]
    assert not found.unfinished
    for line in found.rows:
        whole = detrellis.train(
            line.planned.recipe, data=shapes, out=tmp_path / line.name, workers=0, device="cpu"
        )
        assert whole.result is not None
        assert whole.result.ap is not None
        assert line.final.mean == pytest.approx(100 * whole.result.ap, abs=1e-6)
        one, other = (
            load_file(place / "last.safetensors")
            for place in (whole.run, out / line.name / "seed-0")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert line.after_nms is not None
        apart = detrellis.evaluate(
            out / line.name / "seed-0" / "last.safetensors", nms=0.7, workers=0, device="cpu"
        )
        assert [e.mean for e in line.after_nms] == [
            100 * (apart.stats[n] or 0) for n in ("AP", "AP50", "AP75")
        ]
        assert line.memory is not None
        assert line.step_seconds is not None
    again = conduct(plan, out, **how, console=quiet())  # nothing is left to do
    assert to_dict(again) == to_dict(found)
    with pytest.raises(UserError, match="another study"):
        conduct(make_plan({"none": None}), out, **how, console=quiet())
