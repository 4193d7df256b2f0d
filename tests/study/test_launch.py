"""Where trials run: the seam between a study and what starts its runs,
and the job that a cluster is given.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from detrellis.engine.trackers import ORDER
from detrellis.errors import UserError
from detrellis.study import launch, run
from detrellis.study.cluster import LauncherName, find_launcher
from detrellis.study.conduct import conduct
from detrellis.study.launch import Job, TrialJob
from detrellis.study.run import Resources

from .trials import finish, make_plan

# In place of a training: SIGTERM is answered as by one that saves.
STUB = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(folder / "started").touch()
time.sleep(60 if folder.name == "slow" else 0)
sys.exit(7)
"""


@dataclass
class Queued:
    """A job that has to be asked twice before it ends."""

    folder: Path
    code: int
    asked: int = 0
    told: list[str] = field(default_factory=list)

    def poll(self) -> int | None:
        self.asked += 1
        return None if self.asked < 2 else self.code

    def wait(self) -> int:
        return 143

    def terminate(self) -> None:
        self.told.append("terminate")

    def kill(self) -> None:
        self.told.append("kill")


class Cluster:
    """Ends each job as its seed says: 0 finished, 1 failed, 2 preempted."""

    here = False

    def __init__(self) -> None:
        self.jobs: list[Queued] = []

    def start(self, folder: Path, threads: int | None) -> Job:
        assert threads is None  # a job has what its cluster gives it
        order = json.loads((folder / ORDER).read_text())
        assert order["jobs"] == 1
        if order["seed"] == 0:
            folder = folder.rename(folder.with_name("before"))
            finish(folder.with_name("seed-0"), [10.0])
        else:
            (folder / "console.log").write_text("ValueError: no\n")
        self.jobs.append(Queued(folder, (0, 1, 143)[order["seed"]]))
        return self.jobs[-1]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_study_over_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "POLL_SECONDS", 0.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cluster, plan = Cluster(), make_plan({"none": None}, seeds=(0, 1, 2))
    found = run.run(plan, tmp_path, Resources(jobs=3, launcher=cluster), quiet())
    assert [o.state for o in found] == ["finished", "failed", "stopped"]
    assert found[1].log == "ValueError: no\nexit code 1"
    again = Cluster()
    run.run(plan, tmp_path, Resources(jobs=1, launcher=again), quiet())
    # What is finished is not started
    assert [job.folder.name for job in again.jobs] == ["seed-1", "seed-2"]


def test_an_interrupted_study_cancels_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.time, "sleep", interrupt)
    cluster = Cluster()
    found = run.run(
        make_plan({"a": None, "b": None}, seeds=(1,)),
        tmp_path,
        Resources(jobs=1, launcher=cluster),
        quiet(),
    )
    assert [job.told for job in cluster.jobs] == [["terminate"]]
    assert [o.state for o in found] == ["stopped", "waiting"]


def until(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def test_a_job_passes_its_end_on_to_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM reaches the trial, which saves; the job's exit code is the trial's."""
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)
    (slow := tmp_path / "slow").mkdir()

    def end() -> None:
        until(slow / "started")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=end).start()
    assert TrialJob(slow, ("-c", STUB))() == 143
    assert (slow / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert TrialJob(tmp_path, ("-c", STUB))() == 7


def test_a_job_that_is_preempted_saves_and_is_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As submitit ends a job: `checkpoint` in the handler of a signal that the trial never gets,
    and then out.
    """
    pytest.importorskip("submitit")
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)
    (slow := tmp_path / "slow").mkdir()
    job, submissions = TrialJob(slow, ("-c", STUB)), []

    def preempted(*_: object) -> None:
        assert job._process is not None
        os.kill(job._process.pid, signal.SIGUSR2)  # Slurm signals all processes of a job
        submissions.append(job.checkpoint())
        sys.exit(-1)

    def end() -> None:
        until(slow / "started")
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, preempted)
    threading.Thread(target=end).start()
    try:
        with pytest.raises(SystemExit):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (slow / "saved").exists()
    assert submissions[0].function == TrialJob(slow, ("-c", STUB))


@pytest.mark.parametrize(
    ("name", "options", "threads", "words"),
    [
        (
            "local",
            ["partition=gpu"],
            None,
            "--launcher-option partition=gpu is for jobs of a cluster",
        ),
        ("slurm", ["partition"], None, "not KEY=VALUE"),
        ("slurm", [], 4, "--launcher-option cpus_per_task=4"),
        ("ray", [], 4, "--launcher-option num_cpus=4"),
        ("slurm", ["nodes=2"], None, "a run of a study is one process"),
        ("slurm", ["partition=gpu"], None, "--launcher-option time=240"),
        ("slurm", ["time=240"], None, "Start the study on a login node"),
    ],
)
def test_launchers_that_cannot_be_used(
    name: LauncherName,
    options: list[str],
    threads: int | None,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "slurm" and threads is None:
        pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")  # without srun
    with pytest.raises(UserError, match=words):
        find_launcher(name, options, threads)


@pytest.mark.parametrize(("name", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_package_that_is_missing_is_named(
    name: LauncherName, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"detrellis\\[{name}\\]"):
        find_launcher(name)


def test_equal_time_is_not_measured_for_other_machines(tmp_path: Path) -> None:
    plan = make_plan({"none": None, "align": None})
    timed = type(plan)(**{**vars(plan), "pace": {}})
    with pytest.raises(UserError, match="--equal time times steps on this machine"):
        conduct(timed, tmp_path, launcher=Cluster(), console=quiet())
