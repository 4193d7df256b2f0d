"""Whatever ends a run, what was trained is there, and the message says how to go on with it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import detrellis
from detrellis import atomic
from detrellis.cli import app
from detrellis.engine.guard import NonFiniteLoss
from detrellis.engine.log import RunLog, read_records
from detrellis.engine.outcome import TrainResult
from detrellis.engine.resume import load_run
from detrellis.errors import Advice, UserError
from detrellis.training import TrainableDetector

from .test_resume import SETTINGS as USUAL
from .test_resume import assert_same_run, same, stop_at

STEPS, EPOCHS = 3, 2  # steps an epoch
SETTINGS = [*USUAL, "detector.width=32", "detector.queries.count=8"]


def run(data: Path, out: Path) -> TrainResult:
    return detrellis.train("tiny", data=data, out=out, override=SETTINGS, epochs=EPOCHS, workers=0)


def snapshot(folder: Path, to: Path) -> None:
    """The folder as a process that is killed now leaves it.
    Files that are moved into place are never written again.
    """
    shutil.copytree(
        folder,
        to,
        copy_function=lambda a, b: (
            Path(b).hardlink_to(a) if ".jsonl" not in a else shutil.copy(a, b)
        ),
    )


@pytest.fixture(scope="module")
def told(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A run that nobody stops, and its folder before and after each move of a file into its
    place.
    """
    base = tmp_path_factory.mktemp("killed")
    out, replace, moments = base / "run", atomic.os.replace, []

    def watched(partial: Path, path: Path) -> None:
        moments.append(base / f"{len(moments):02}")
        snapshot(out, moments[-1])
        replace(partial, path)
        moments.append(base / f"{len(moments):02}")
        snapshot(out, moments[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic.os, "replace", watched)
        assert run(shapes, out).finished
    return out, moments


def test_a_run_that_is_killed_while_saving_can_go_on(
    told: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """At each moment there is a whole state, but before the first;
    of the torn ones two go on to the same end.
    """
    whole, moments = told
    torn, seen = [], []
    for moment in moments:
        assert list(moment.glob(".*.partial")) or moment.name not in ("00",)
        if not (moment / "last.state.pt").exists():
            assert moment == moments[0]
            with pytest.raises(UserError, match="nothing to resume"):
                detrellis.resume(moment)
            continue
        state, _ = load_run(moment)
        seen.append(state["step"])
        if (moment / "last.safetensors").exists():
            weights = detrellis.load(moment / "last.safetensors")
            mine = state["model" if state["ema"] is None else "ema"]
            if not all(
                same(value, mine[name]) for name, value in weights.detector.state_dict().items()
            ):
                torn.append(moment)
    assert seen[0] == 0
    assert seen == sorted(seen)
    assert len(torn) >= 2
    # Its result is in the log, and in no state yet
    unsaved = next(m for m in moments if has_row(m, 1))
    assert load_run(unsaved)[0]["epoch"] == 0
    for moment in (moments[1], torn[0], unsaved, torn[-1]):
        shutil.copytree(moment, tmp_path / moment.name)
        assert detrellis.resume(tmp_path / moment.name, workers=0).finished
        assert not list((tmp_path / moment.name).glob(".*.partial"))
        assert_same_run(whole, tmp_path / moment.name)


def test_a_torn_last_state_costs_what_came_after_the_one_before(
    told: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(told[0], out)
    os.truncate(out / "last.state.pt", 5000)
    with pytest.warns(Advice, match="not a whole file"):
        assert detrellis.resume(out, workers=0).finished
    assert_same_run(told[0], out)


def has_row(run: Path, epoch: int) -> bool:
    log = run / "metrics.jsonl"
    return log.exists() and any(
        r["kind"] == "epoch" and r["epoch"] == epoch for r in read_records(log)
    )


def test_each_epoch_writes_its_state_once(told: tuple[Path, list[Path]]) -> None:
    """And once before the first step and after the last result:
    a large state takes seconds. A card has the figures of its own weights or none."""
    files = {
        (m / "last.state.pt").stat().st_ino: m for m in told[1] if (m / "last.state.pt").exists()
    }
    saved = [load_run(moment)[0] for moment in files.values()]
    assert [(s["epoch"], s["step"]) for s in saved] == [
        (0, 0),
        (0, STEPS),
        (1, 2 * STEPS),
        (2, 2 * STEPS),
    ]
    cards = [json.loads(state["card"]["detrellis"]) for state in saved]
    assert {(card["epoch"], card["stats"] is not None) for card in cards} == {
        (0, False),
        (1, False),
        (2, True),
    }


def test_a_run_of_before_states_held_their_card(
    told: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """It takes that of the last weights, if they are of its own epoch;
    a state is moved before them.
    """
    late = [m for m in told[1] if has_row(m, 1) and not has_row(m, 2)]
    assert load_run(late[-2])[0]["step"] == 2 * STEPS
    for moment, name in ((late[-2], "torn"), (late[-1], "whole")):
        shutil.copytree(moment, tmp_path / name)
        state = torch.load(moment / "last.state.pt", weights_only=True)
        del state["card"], state["images"]
        (tmp_path / name / "last.state.pt").unlink()  # a link
        torch.save(state, tmp_path / name / "last.state.pt")
    with pytest.raises(UserError, match="'card' is missing") as error:
        detrellis.resume(tmp_path / "torn")
    assert f"--weights {tmp_path / 'torn'}" in error.value.remedy
    assert detrellis.resume(tmp_path / "whole", workers=0).finished
    assert_same_run(told[0], tmp_path / "whole")


def test_a_stored_factor_of_no_parameter_does_not_stop_a_run(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new run with one is refused; one that was stored before goes on."""
    idle = [*SETTINGS, "optim.scaled={queries.nothing: 0.1}"]
    with pytest.raises(UserError, match=r"no parameter's name contains 'queries\.nothing'"):
        detrellis.train("tiny", data=shapes, out=tmp_path / "run", override=idle, workers=0)
    from detrellis.recipes import build

    with monkeypatch.context() as patch:
        patch.setattr(build, "_refuse_idle_factors", lambda *_: None)
        stop_at(patch, 1)
        detrellis.train(
            "tiny", data=shapes, out=tmp_path / "run", override=idle, epochs=1, workers=0
        )
    assert detrellis.resume(tmp_path / "run", workers=0).finished


def test_a_worker_that_is_killed_costs_nothing(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_step = RunLog.step

    def step(self: RunLog, number: int, *args: Any, **kwargs: Any) -> None:
        log_step(self, number, *args, **kwargs)
        if number == 2:
            for worker in torch.multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)
                worker.join()

    settings = [*SETTINGS, "optim.batch_size=2", "optim.accumulate=1"]
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", step)
        with pytest.raises(UserError, match="a loader worker died") as error:
            detrellis.train(
                "tiny", data=shapes, out=tmp_path / "run", override=settings, epochs=2, workers=1
            )
    assert "--workers 0" in error.value.remedy
    step_saved = load_run(tmp_path / "run")[0]["step"]
    assert step_saved >= 2
    assert (
        f"Nothing that was trained is lost: the run is saved up to step {step_saved}"
        in error.value.remedy
    )
    assert "Done in" in follow(error.value.remedy)


def test_a_picture_that_cannot_be_evaluated_costs_nothing(
    shapes: Path, told: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    picture = sorted((data / "images" / "val").iterdir())[2]
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=picture.name) as error:
        run(data, tmp_path / "run")
    assert "Nothing that was trained is lost" in error.value.remedy
    state, _ = load_run(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (0, STEPS)
    picture.write_bytes(whole)
    follow(error.value.remedy)
    assert_same_run(told[0], tmp_path / "run")


def follow(text: str, code: int = 0) -> str:
    """Do what the first command in a message says."""
    found = re.search(r"detrellis (train --resume .*)", text)
    assert found is not None, text
    done = CliRunner().invoke(
        app, [*shlex.split(found[1]), "--workers", "0"], catch_exceptions=False
    )
    assert done.exit_code == code, done.output
    return done.output


def test_an_error_of_ours_costs_nothing_either(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the log, between two steps:
    what the steps since the last checkpoint trained is saved first.
    """
    log_step = RunLog.step

    def step(self: RunLog, number: int, *args: Any, **kwargs: Any) -> None:
        log_step(self, number, *args, **kwargs)
        if number == 2:
            raise ZeroDivisionError("drawing")

    monkeypatch.setattr(RunLog, "step", step)
    with pytest.raises(ZeroDivisionError) as error:
        run(shapes, tmp_path / "run")
    assert "saved up to step 2" in error.value.__notes__[0]
    assert load_run(tmp_path / "run")[0]["step"] == 2


def test_a_step_that_breaks_off_is_not_saved(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights may have moved where the average has not:
    the run goes on from the checkpoint before.
    """
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def break_off(*args: Any) -> None:
        calls.append(clip(*args))
        if len(calls) == 2:
            raise ZeroDivisionError("clipping")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", break_off)
    with pytest.raises(ZeroDivisionError) as error:
        run(shapes, tmp_path / "run")
    assert "The run is saved up to step 0" in error.value.__notes__[0]
    assert load_run(tmp_path / "run")[0]["step"] == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_last_checkpoint(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Or a quota that is used up."""
    save, calls = torch.save, []
    errors = [
        OSError(number, os.strerror(number)),
        RuntimeError("unexpected pos 64 vs 0\nmore"),
    ]

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 1:
            Path(args[1]).write_bytes(b"PK")
            raise errors.pop(0)
        save(*args)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=f"cannot be saved .{os.strerror(number)}") as error:
        run(shapes, tmp_path / "run")
    assert "The run is saved up to step 0" in error.value.remedy
    assert not list((tmp_path / "run").glob(".*.partial"))
    assert load_run(tmp_path / "run")[0]["step"] == 0
    calls.clear()
    calls.append(())
    # Torch's words
    with pytest.raises(UserError, match=r"cannot be saved .unexpected pos 64 vs 0.\n") as error:
        run(shapes, tmp_path / "second")
    assert error.value.remedy == "Nothing has been trained yet: make room, or take another --out."


def test_a_log_that_cannot_be_written_does_not_stop_the_run(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = []

    def full(self: Any, record: Any) -> None:
        written.append(record)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("detrellis.engine.log._RecordFile.write", full)
    result = detrellis.train(
        "tiny", data=shapes, out=tmp_path / "run", override=SETTINGS, epochs=1, workers=0
    )
    assert result.finished
    assert len(written) > 1
    assert (
        capsys.readouterr().out.count(
            "metrics.jsonl cannot be written now (No space left on device)"
        )
        == 1
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_unfinished_run_is_no_success(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    options = [a for s in SETTINGS for a in ("-o", s)]
    command = [
        "train",
        "tiny",
        "--data",
        str(shapes),
        "--out",
        str(tmp_path / "a run"),
        "--epochs",
        "1",
        "--workers",
        "0",
    ]
    as_json = ["--json"] if number == signal.SIGTERM else []
    with monkeypatch.context() as patch:
        stop_at(patch, 1, number)
        done = CliRunner().invoke(app, [*command, *options, *as_json])
    assert done.exit_code == code, done.output
    if as_json:
        assert json.loads(done.stdout)["finished"] is False
    else:
        assert f"Stopped by {signal.Signals(number).name} after step 1, and saved." in done.output
        assert "Done in" in follow(done.output)


def test_a_long_epoch_is_saved_now_and_then(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    monkeypatch.setattr("detrellis.engine.saves.SAVE_EVERY_SECONDS", -1.0)
    monkeypatch.setattr(
        RunLog, "step", lambda *_, **__: saved.append(load_run(tmp_path / "run")[0]["step"])
    )
    detrellis.train(
        "tiny", data=shapes, out=tmp_path / "run", override=SETTINGS, epochs=1, workers=0
    )
    assert saved == list(range(STEPS))


def test_a_second_ctrl_c_stops_at_once(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And a second SIGTERM does not:
    a machine that shuts down repeats it while the run is saved.
    """
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / signal.Signals(number).name
        stopping = (
            pytest.raises(KeyboardInterrupt)
            if number == signal.SIGINT
            else contextlib.nullcontext()
        )
        with monkeypatch.context() as patch, stopping:
            stop_at(patch, 1, number)
            stop_at(patch, 1, number)
            run(shapes, out)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert load_run(tmp_path / "SIGINT")[0]["step"] == 0
    assert load_run(tmp_path / "SIGTERM")[0]["step"] == 1
    said = capsys.readouterr().out
    assert (
        "Stopped at once. The run is saved up to step 0. Go on with: detrellis train --resume"
        in said
    )
    assert "Done in" in follow(said)


def test_a_loss_that_is_not_finite_is_gone_on_from_as_the_message_says(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate of 1e-3 is too high here in step 5: after epoch 1 was saved."""
    forward, rates = TrainableDetector.forward, []
    from detrellis.engine import train

    set_rate = train.set_learning_rate
    monkeypatch.setattr(
        train, "set_learning_rate", lambda o, lr: (rates.append(lr), set_rate(o, lr))[1]
    )

    def diverging(self: TrainableDetector, *args: Any) -> Any:
        out = forward(self, *args)
        if max(rates) > 5e-4 and len(rates) == 5:
            out.losses["main/box/0"] = out.losses["main/box/0"] * float("nan")
        return out

    monkeypatch.setattr(TrainableDetector, "forward", diverging)
    settings = [*SETTINGS, "optim.lr=1e-3", "schedule.warmup=0"]
    with pytest.raises(NonFiniteLoss) as error:
        detrellis.train(
            "tiny", data=shapes, out=tmp_path / "run", override=settings, epochs=2, workers=0
        )
    assert f"from the last checkpoint, of step {STEPS}" in error.value.remedy
    rates.clear()
    output = follow(error.value.remedy)
    assert "Done in" in output
    assert f"goes on after epoch 0 of 2, step {STEPS}" in output  # it evaluates again
    assert 0 < max(rates) <= 1e-4
    card = load_run(tmp_path / "run")[1]
    assert card.changes == [{"epoch": 0, "step": STEPS, "set": ["optim.lr=0.0001"]}]
    assert card.recipe.optim.lr == 1e-4


def test_weights_that_are_not_finite_are_not_saved(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(self: RunLog, step: int, *args: Any, **kwargs: Any) -> None:
        for group in found[0].optimizer.param_groups:
            group["params"][0].data.fill_(float("nan"))

    from detrellis.engine import train

    found: list[Any] = []
    fresh = train.fresh_state
    monkeypatch.setattr(
        train, "fresh_state", lambda *a, **k: (found.append(fresh(*a, **k)), found[-1])[1]
    )
    monkeypatch.setattr(
        RunLog, "step", lambda self, step, *a, **k: poison(self, step) if step == STEPS else None
    )
    with pytest.raises(NonFiniteLoss, match="step 3: the weights are not finite any more"):
        run(shapes, tmp_path / "run")
    assert load_run(tmp_path / "run")[0]["step"] == 0


def test_a_finished_run_says_so_and_can_be_made_longer(
    shapes: Path, told: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With more epochs the learning rate is the longer schedule's, from here on."""
    shutil.copytree(told[0], tmp_path / "run")
    before = (tmp_path / "run" / "last.state.pt").stat().st_mtime_ns
    assert detrellis.resume(tmp_path / "run", workers=0).finished
    assert (tmp_path / "run" / "last.state.pt").stat().st_mtime_ns == before
    said = capsys.readouterr().out
    assert f"has finished its {EPOCHS} epochs" in said
    assert f"--weights {tmp_path / 'run'}" in said
    with pytest.raises(UserError, match=f"has done {EPOCHS} epochs"):
        detrellis.resume(tmp_path / "run", epochs=EPOCHS)
    assert "Done in" in follow(said)
    rows = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "epoch"]
    assert [r["epoch"] for r in rows] == [1, 2, 3]
    state, card = load_run(tmp_path / "run")
    assert (state["epoch"], card.recipe.schedule.epochs, state["step"]) == (3, 3, 3 * STEPS)
    assert card.changes == [{"epoch": 2, "step": 2 * STEPS, "set": ["schedule.epochs=3"]}]


def test_what_a_state_depends_on_cannot_be_set(told: tuple[Path, list[Path]]) -> None:
    for setting in ("detector.width=32", "optim.batch_size=2", "optim.lrs=1", "schedule.epochs=9"):
        with pytest.raises(UserError, match=re.escape(f"-o {setting}")):
            detrellis.resume(told[0], override=setting)


def test_data_that_moved(
    shapes: Path, told: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out, there = tmp_path / "data", tmp_path / "run", tmp_path / "new place"
    shutil.copytree(shapes, data)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        run(data, out)
    data.rename(there)
    for verb, call in (("train --resume", detrellis.resume), ("eval", detrellis.evaluate)):
        with pytest.raises(
            UserError, match=r"its data set is not where it was: .*data/.* is missing"
        ) as error:
            call(out)
        assert f"detrellis {verb} {out} --data FOLDER" in error.value.remedy
    assert detrellis.evaluate(out / "last.safetensors", data=there, workers=0).images == 5
    other = tmp_path / "other"
    shutil.copytree(there, other)
    listing = other / "annotations" / "instances_train.json"
    content = json.loads(listing.read_text())
    content["images"][0]["file_name"] = "new.jpg"
    (other / "images" / "train" / "new.jpg").write_bytes(
        next((other / "images" / "train").iterdir()).read_bytes()
    )
    listing.write_text(json.dumps(content))
    with pytest.raises(
        UserError,
        match=r"images of train are not those of the run: 11 then, 11 now; missing .*; new new.jpg",
    ):
        detrellis.resume(out, data=other)
    content["categories"][0]["name"] = "other"
    listing.write_text(json.dumps(content))
    assert detrellis.resume(out, data=there, workers=0).finished
    assert load_run(out)[1].data["splits"]["train"]["annotations"].startswith(str(there))
    assert_same_run(told[0], out)
