"""A run that is stopped and resumed ends with the same bits as one that is not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import detrellis
from detrellis.engine.log import RunLog, read_records
from detrellis.engine.outcome import TrainResult
from detrellis.errors import UserError

from ..small import SMALL

# Dropout and denoising draw at random; the average, the schedule, accumulation and a scheme that is
# switched off in the middle have a position of their own.
SETTINGS = [
    *SMALL,
    "data.size=[64, 64]",
    "optim.batch_size=4",
    "optim.accumulate=2",
    "detector.dropout=0.1",
    "schedule.warmup=0.3",
    "schemes.group={k: 2, until: 0.5}",
]
EPOCHS = 3  # of 3 steps: 11 images in batches of 4


def run(data: Path, out: Path, settings: list[str] = SETTINGS) -> TrainResult:
    return detrellis.train("tiny", data=data, out=out, override=settings, epochs=EPOCHS, workers=0)


def stop_at(monkeypatch: pytest.MonkeyPatch, wanted: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal right after step `wanted`."""
    log_step = RunLog.step

    def step(self: RunLog, step: int, *args: Any, **kwargs: Any) -> None:
        log_step(self, step, *args, **kwargs)
        if step == wanted:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunLog, "step", step)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def assert_same_run(one: Path, other: Path) -> None:
    first, second = (torch.load(run / "last.state.pt", weights_only=True) for run in (one, other))
    cards = [json.loads(state["card"]["detrellis"]) for state in (first, second)]
    assert cards[0] | {"data": 0} == cards[1] | {"data": 0, "changes": []}
    for name in first:
        if name not in ("seconds", "card"):
            assert same(first[name], second[name]), name
    for name in ("last", "best"):
        assert same(*(load_file(run / f"{name}.safetensors") for run in (one, other))), name
    # Each epoch has one row in the log, however often it was interrupted.
    rows = [
        [r["epoch"] for r in read_records(run / "metrics.jsonl") if r["kind"] == "epoch"]
        for run in (one, other)
    ]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(shapes, out).finished
    return out


@pytest.mark.parametrize(
    ("step", "number"),
    [(1, signal.SIGTERM), (2, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGTERM)],
)
def test_a_stopped_run_continues_bit_for_bit(
    shapes: Path,
    whole: Path,
    tmp_path: Path,
    step: int,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        stopped = run(shapes, out)
    assert not stopped.finished
    assert stopped.steps == step
    assert not (out / "report.html").exists()  # of a finished run
    torch.manual_seed(12345)  # whatever the new process drew before
    torch.rand(7)
    resumed = detrellis.resume(out, workers=1)
    assert resumed.finished
    assert resumed.steps == 3 * EPOCHS
    assert_same_run(whole, out)


def test_another_seed_is_another_run(shapes: Path, whole: Path, tmp_path: Path) -> None:
    other = detrellis.train(
        "tiny", data=shapes, out=tmp_path / "b", override=SETTINGS, epochs=EPOCHS, workers=0, seed=1
    )
    assert not same(
        load_file(whole / "last.safetensors"), load_file(other.run / "last.safetensors")
    )


def test_a_new_run_never_overwrites_an_old_one(shapes: Path, whole: Path) -> None:
    with pytest.raises(UserError, match="--resume"):
        run(shapes, whole)


def test_a_finished_run_resumes_to_nothing(whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_text()
    assert detrellis.resume(whole, workers=0).finished
    assert (whole / "metrics.jsonl").read_text() == before


def test_truncated_state_is_one_clear_error(whole: Path, tmp_path: Path) -> None:
    broken = tmp_path / "run"
    broken.mkdir()
    for name in ("last.state.pt", "last.safetensors"):
        (broken / name).write_bytes((whole / name).read_bytes()[:5000])
    with pytest.raises(UserError, match=r"last\.state\.pt: not a whole file"):
        detrellis.resume(broken)
    with pytest.raises(UserError, match=r"last\.safetensors: not a whole checkpoint"):
        detrellis.load(broken)


def test_weights_carry_everything_to_rebuild(whole: Path) -> None:
    model = detrellis.load(whole / "best.safetensors")
    assert model.classes.names == ("disc", "square", "triangle", "star", "ring")
    assert model.classes.ids == (1, 3, 4, 7, 9)
    assert model.recipe.detector.width == 64
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    best = max(r["eval"]["AP"] for r in records if r["kind"] == "epoch")
    assert detrellis.evaluate(whole, workers=0).ap == pytest.approx(best, abs=1e-9)
