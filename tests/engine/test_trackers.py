"""Trackers: what they get, that none of them stops a run,
and that a resumed run goes on in the same one.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

import detrellis
from detrellis.engine import trackers as tracking
from detrellis.engine.log import RunLog
from detrellis.engine.tracker_libraries import (
    MLflow,
    TensorBoard,
    Trackio,
    Wandb,
    named,
    tracker_names,
)
from detrellis.engine.trackers import Status, TrackedRun, Tracker, Trackers, read_ids
from detrellis.errors import UserError
from tests.engine.test_log import Run
from tests.engine.test_saving import SETTINGS

SHEET = Image.new("RGB", (8, 6), "red")


@pytest.fixture(autouse=True)
def _frequent_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detrellis.engine.log.RECORD_EVERY", 5)


class Recorder:
    """A tracker that notes its calls; `fails` names one that raises."""

    name, remedy = "recorder", "Try again."

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails = fails

    def note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fails:
            raise SystemExit("no [server]\nthere")

    def start(self, run: TrackedRun, resume: str | None) -> str:
        self.note("start", run.name, run.step, run.config, resume)
        return resume or "id-1"

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.note("metrics", values, step)

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.note("picture", name, picture.size, step)

    def end(self, status: Status) -> None:
        self.note("end", status)


def test_a_tracker_gets_every_record_and_a_resumed_run_goes_on_in_the_same_one(
    tmp_path: Path,
) -> None:
    first = Recorder()
    assert isinstance(first, Tracker)
    run = Run(tmp_path / "run", trackers=[first], config={"seed": 3})
    run.log.picture("sheet", SHEET)
    run.epoch(1, stats={"AP": 0.5, "AP75": None})
    run.log.status = "finished"
    run.log.close()
    run.log.close()
    assert first.calls[:2] == [
        ("start", f"{tmp_path.name}-run", 0, {"seed": 3}, None),
        ("picture", "sheet", (8, 6), 0),
    ]
    assert [call[2] for call in first.calls if call[0] == "metrics"] == [1, 5, 10, 10]
    assert first.calls[3][1]["losses/main/class/1"] == 3.5
    epoch = first.calls[5][1]
    assert epoch["epoch/eval/AP"] == 0.5
    assert "epoch/eval/AP75" not in epoch
    assert first.calls[6:] == [("end", "finished")]

    second = Recorder()
    Run(tmp_path / "run", trackers=[second], step=5).log.close()
    assert second.calls[0] == ("start", f"{tmp_path.name}-run", 5, {}, "id-1")
    third = Recorder()
    Run(tmp_path / "run", trackers=[third]).log.close()
    assert third.calls[0][-1] is None  # a new run is a new one there, too


def test_other_processes_do_not_track(tmp_path: Path) -> None:
    tracker = Recorder()
    log = RunLog(tmp_path, epochs=1, steps_per_epoch=1, rank=1, trackers=[tracker])
    log.picture("sheet", SHEET)
    log.close()
    assert tracker.calls == []


@pytest.mark.parametrize("fails", ["start", "metrics", "picture", "end"])
def test_a_tracker_that_fails_is_one_warning(tmp_path: Path, fails: str) -> None:
    broken, good = Recorder(fails), Recorder()
    run = Run(tmp_path, trackers=[broken, good])
    run.log.picture("sheet", SHEET)
    run.epoch(1)
    run.epoch(2)
    run.log.close()
    text = run.text.getvalue()
    assert (
        text.count(
            "recorder failed (SystemExit: no [server] there). The run goes on without it. Try "
            "again."
        )
        == 1
    )
    assert text.count("warning") == 1
    assert broken.calls[-1][0] == fails
    assert good.calls[-1] == ("end", "stopped")


def test_a_tracker_that_hangs_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    class Hanging(Recorder):
        def start(self, run: TrackedRun, resume: str | None) -> str:
            released.wait(20)
            return super().start(run, resume)

    monkeypatch.setattr(tracking, "START_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "END_SECONDS", 0.05)
    tracker, before = Hanging(), time.monotonic()
    run = Run(tmp_path, trackers=[tracker])
    run.epoch(1)
    run.log.close()
    assert time.monotonic() - before < 10
    assert run.text.getvalue().count("recorder has not begun within") == 1
    assert run.text.getvalue().count("warning") == 1
    released.set()


def test_a_tracker_that_falls_behind_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, said = threading.Event(), list[str]()

    class Slow(Recorder):
        def log_metrics(self, values: dict[str, float], step: int) -> None:
            released.wait(20)

    monkeypatch.setattr(tracking, "WAITING", 2)
    monkeypatch.setattr(tracking, "END_SECONDS", 0.05)
    trackers = Trackers([Slow()], TrackedRun(tmp_path, "run", 0, {}), said.append)
    for step in range(5):
        trackers.metrics({"loss": 1.0}, step)
    trackers.end("finished")
    released.set()
    assert len(said) == 1
    assert "does not take what it is given" in said[0]


def test_a_damaged_file_of_ids_begins_anew(tmp_path: Path) -> None:
    (tmp_path / tracking.IDS).write_text("[1, 2")
    tracker = Recorder()
    Run(tmp_path, trackers=[tracker], step=5).log.close()
    assert tracker.calls[0][-1] is None


def test_a_run_and_what_goes_on_with_it(shapes: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"workers": 0, "console": Console(file=io.StringIO())}
    first, second = Recorder(), Recorder("start")
    done = detrellis.train(
        "tiny",
        data=shapes,
        out=tmp_path / "run",
        override=SETTINGS,
        epochs=1,
        track=first,
        **options,
    )
    assert read_ids(done.run) == {"recorder": "id-1"}
    (_, _, step, config, resumed), picture = first.calls[:2]
    assert (step, resumed, config["recipe"]["name"], config["seed"]) == (0, None, "tiny", 0)
    assert str(shapes) not in json.dumps(config)
    assert picture[:2] == ("picture", "train_samples")
    assert "epoch/eval/AP50" in first.calls[-2][1]
    assert first.calls[-1] == ("end", "finished")
    again = detrellis.resume(done.run, epochs=2, track=[second], **options)
    assert (again.finished, again.epochs) == (True, 2)
    assert second.calls == [
        ("start", *first.calls[0][1:2], done.steps, *second.calls[0][3:4], "id-1")
    ]


def test_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"(?s)wandbb.*Did you mean 'wandb'"):
        tracker_names(["wandbb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"(?s)is not installed.*detrellis\["):
        tracker_names(["tensorboard,mlflow"])
    assert [
        tracker.name for tracker in named(["tensorboard", "mlflow", "tensorboard", "mine"])
    ] == [
        "tensorboard",
        "mlflow",
    ]


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a library may take a minute to be imported."""
    monkeypatch.setattr(tracking, "START_SECONDS", 600)
    monkeypatch.setattr(tracking, "END_SECONDS", 600)


def both(folder: Path, tracker: type[Tracker]) -> str:
    """An epoch, stopped in the middle and gone on with; what the console says."""
    said = ""
    for step in (0, 5):
        run = Run(folder, step=step, trackers=[tracker()], config={"seed": 3})
        run.log.picture("sheet", SHEET)
        run.log.start_epoch(1)
        run.steps(5)
        if step:
            run.log.end_epoch(stats={"AP": 0.75})
            run.log.status = "finished"
        run.log.close()
        said += run.text.getvalue()
    return said


def study_run(folder: Path) -> Path:
    """The folder of a run of the study `folder`."""
    place = folder / "align=1" / "seed-0"
    place.mkdir(parents=True)
    (place / tracking.ORDER).write_text("{}")
    return place


def test_runs_of_equal_names_are_of_their_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [TrackedRun.of(study_run(tmp_path / study), 0, {}) for study in ("cells", "cards")]
    assert {run.name for run in runs} == {"align=1-seed-0"}
    assert [run.study for run in runs] == ["cells", "cards"]
    monkeypatch.chdir(runs[0].folder)
    assert TrackedRun.of(Path("."), 0, {}).study == "cells"
    assert TrackedRun.of(tmp_path / "cells", 0, {}).study is None


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run(tmp_path, trackers=[TensorBoard()])
    run.epoch(1, stats={"AP": 0.5, "AP75": None})
    run.log.close()
    time.sleep(1.1)  # TensorBoard reads its files by name, and the name has the second in it
    resumed = Run(tmp_path, step=5, trackers=[TensorBoard()])
    resumed.log.picture("sheet", SHEET)
    resumed.epoch(1, stats={"AP": 0.75})
    resumed.log.close()
    events = loading.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(
        {1: 99, 5: 96.5, 10: 92, 15: 87}
    )
    assert [e.value for e in events.Scalars("epoch/eval/AP")] == pytest.approx([0.75])
    assert "epoch/eval/AP75" not in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["sheet"]


def test_without_tensorboard_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = Run(tmp_path, trackers=[TensorBoard()])
    run.epoch(1)
    run.log.close()
    assert run.text.getvalue().count("detrellis[tensorboard]") == 1


@pytest.mark.usefixtures("_patient")
def test_mlflow_keeps_one_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert "warning " not in both(tmp_path / "run", MLflow)
    client = importlib.import_module("mlflow.tracking").MlflowClient(
        tracking_uri=(tmp_path / "mlruns").as_uri()
    )
    experiment = client.get_experiment_by_name("detrellis").experiment_id
    (found,) = client.search_runs([experiment])
    assert (found.info.run_name, found.info.status) == (f"{tmp_path.name}-run", "FINISHED")
    assert read_ids(tmp_path / "run") == {"mlflow": found.info.run_id}
    assert {m.step: m.value for m in client.get_metric_history(found.info.run_id, "loss")} == {
        1: 99,
        5: 96.5,
        10: 92,
    }
    assert found.data.metrics["epoch/eval/AP"] == 0.75
    assert {f.path for f in client.list_artifacts(found.info.run_id)} == {
        "config.json",
        "sheet-0.png",
        "sheet-5.png",
    }


@pytest.mark.usefixtures("_patient")
def test_mlflow_has_an_experiment_for_each_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    for study, experiment in (("cells", None), ("cards", "mine")):
        if experiment:
            monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", experiment)
        assert "warning " not in both(study_run(tmp_path / study), MLflow)
    client = importlib.import_module("mlflow.tracking").MlflowClient(
        tracking_uri=(tmp_path / "mlruns").as_uri()
    )
    for study, experiment in (("cells", "cells"), ("cards", "mine")):
        id_ = client.get_experiment_by_name(experiment).experiment_id
        (found,) = client.search_runs([id_], filter_string=f"tags.study = '{study}'")
        assert found.info.run_name == "align=1-seed-0"


@pytest.mark.usefixtures("_patient")
def test_wandb_keeps_one_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key would be
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    place = study_run(tmp_path / "cells-of-blood")
    assert "warning " not in both(place, Wandb)
    importlib.import_module("wandb").teardown()  # a run that has ended may still be written
    (id_,) = read_ids(place).values()
    files = sorted((place / "wandb").glob(f"offline-run-*-{id_}/run-{id_}.wandb"))
    assert files
    written = b"".join(file.read_bytes() for file in files)
    assert b"losses/main/class/1" in written
    assert b"epoch/eval/AP" in written
    assert b"\x0ecells-of-blood" in written  # its group: as a part of a path it has no length


@pytest.mark.usefixtures("_patient")
def test_trackio_keeps_one_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    assert "warning " not in both(tmp_path / "run", Trackio)
    (name,) = read_ids(tmp_path / "run").values()
    (stored,) = importlib.import_module("trackio").Api().runs("detrellis")
    assert stored.name == name
