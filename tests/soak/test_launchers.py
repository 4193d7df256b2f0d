"""Studies whose runs are jobs:
submitit with its local executor, and a Ray cluster of this machine.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from detrellis.study import launch, run
from detrellis.study.cluster import Ray, Slurm
from detrellis.study.launch import Launcher
from detrellis.study.run import Resources

from ..study.test_run import STUB, quiet
from ..study.trials import make_plan


@pytest.fixture(params=["submitit", "ray"])
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    package = pytest.importorskip(request.param)
    monkeypatch.setattr(launch, "CHILD", ("-c", STUB))
    return (
        Ray({"num_cpus": 1})
        if request.param == "ray"
        else Slurm({"timeout_min": 5}, package.LocalExecutor)
    )


def test_jobs_finish_and_fail(launcher: Launcher, tmp_path: Path) -> None:
    plan = make_plan({"none": None, "align": None}, seeds=(0, 1))
    found = run.run(plan, tmp_path, Resources(jobs=2, launcher=launcher), quiet())
    assert [o.state for o in found] == ["finished", "finished", "failed", "failed"]
    assert "boom" in found[2].log
    assert "exit code 1" in found[2].log
    again = run.run(plan, tmp_path, Resources(jobs=2, launcher=launcher), quiet())
    assert [o.state for o in again] == ["finished", "finished", "failed", "failed"]
    assert (found[0].folder / "console.log").read_text().count("threads") == 1


def test_an_interrupted_study_cancels_its_jobs(launcher: Launcher, tmp_path: Path) -> None:
    plan = make_plan({"none": None}, seeds=(2,))
    started = plan.trials()[0].folder(tmp_path) / "started"

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    # A job in the background ignores it
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        found = run.run(plan, tmp_path, Resources(launcher=launcher), quiet())
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert [o.state for o in found] == ["stopped"]
