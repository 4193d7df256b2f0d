"""A backbone that is frozen for the first epochs, and trained after them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import detrellis
from detrellis.distributed import all_gather
from detrellis.engine.checkpoint import load_state
from detrellis.engine.outcome import TrainResult
from detrellis.engine.train import TrainRun
from detrellis.errors import UserError
from detrellis.recipes.build import build

from ..small import CLASSES, SMALL, small
from .test_distributed import environment, in_processes, quiet
from .test_resume import assert_same_run, stop_at

pytestmark = pytest.mark.filterwarnings(
    "ignore:detector.backbone.frozen without pretrained weights"
)
FROZEN = ["detector.backbone.frozen=2", "schedule.unfreeze_after=1"]
SETTINGS = [
    *SMALL,
    *FROZEN,
    "data.size=[64, 64]",
    "optim.batch_size=4",
    "optim.ema=0",
    "schedule.keep_every=1",
]
STEPS, EPOCHS = 3, 3  # 11 images
STILL = (
    "backbone.model.conv1",
    "backbone.model.bn1",
    "backbone.model.layer1.",
    "backbone.model.layer2.",
)


def run(data: Path, out: Path) -> TrainResult:
    console = quiet()
    return detrellis.train(
        "tiny",
        data=data,
        out=out,
        override=SETTINGS,
        epochs=EPOCHS,
        workers=0,
        device="cpu",
        console=console,
    )


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {
        name for name in one if name.startswith(STILL) and not torch.equal(one[name], other[name])
    }


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unfreeze") / "run"
    assert run(shapes, out).finished
    return out


def test_frozen_stages_rest_and_then_learn(whole: Path) -> None:
    """Weights and statistics; the optimizer knows nothing of the epochs in which they rested."""
    recipe = small("tiny").override(SETTINGS)
    start = build(recipe, CLASSES).detector.state_dict()
    first, second = (load_file(whole / "epochs" / f"{epoch:04}.safetensors") for epoch in (1, 2))
    assert not changed(first, start)
    moved = changed(second, first)
    assert {name for name in moved if "running_mean" in name}
    model = build(recipe, CLASSES)
    frozen = {f"detector.{name}" for name in moved}
    weights = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(tuple(f"detector.{s}" for s in STILL))
    ]
    assert set(weights) <= frozen
    state = load_state(whole)["optimizer"]["state"]
    steps = sorted({int(moments["step"]) for moments in state.values()})
    assert steps == [STEPS * (EPOCHS - 1), STEPS * EPOCHS]
    assert sum(int(m["step"]) == steps[0] for m in state.values()) == len(weights)


@pytest.mark.parametrize("step", [2, STEPS, STEPS + 1])
def test_a_run_stopped_on_either_side_continues_bit_for_bit(
    shapes: Path, whole: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run(shapes, tmp_path / "run").steps == step
    assert detrellis.resume(tmp_path / "run", workers=0, device="cpu").finished
    assert_same_run(whole, tmp_path / "run")


def in_each(rank: int, size: int, port: int, data: str, out: str) -> None:
    """In each process: a whole run,
    whose weights are compared with the other's after each epoch.
    """
    os.environ |= environment(rank, size, port)
    torch.set_num_threads(1)
    end_epoch, epochs = TrainRun.end_epoch, []

    def compared(self: TrainRun) -> None:
        end_epoch(self)
        weights = torch.cat([tensor.double().flatten() for tensor in self.state.weights().values()])
        assert torch.equal(*all_gather(weights))  # with BatchNorm's statistics, which are evaluated
        epochs.append(self.state.model.detector.backbone.held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainRun, "end_epoch", compared)
        assert run(Path(data), Path(out)).finished
    assert epochs == [True, False, False]
    Path(f"{out}.{rank}").touch()


def test_two_processes_keep_the_same_weights(shapes: Path, tmp_path: Path) -> None:
    in_processes(in_each, str(shapes), str(tmp_path / "run"))
    assert {path.name for path in tmp_path.glob("run.*")} == {"run.0", "run.1"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["schedule.unfreeze_after=2"], "frozen=0 freezes nothing"),
        (
            ["schedule.unfreeze_after=40", "detector.backbone.frozen=1"],
            "the whole run has 40 epochs",
        ),
    ],
)
def test_what_cannot_be_let_go_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(small("tiny").override(settings), CLASSES)


def test_a_run_that_goes_on_keeps_the_epoch(whole: Path) -> None:
    with pytest.raises(UserError, match=r"-o schedule\.unfreeze_after=2: a run that goes on"):
        detrellis.resume(whole, override="schedule.unfreeze_after=2")
