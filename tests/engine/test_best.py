"""What follows from the AP of each evaluation:
which weights are kept, and when a run has gone on for long enough.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

import detrellis
from detrellis.data.layout import find_data
from detrellis.engine.checkpoint import load_weights
from detrellis.engine.log import read_records
from detrellis.engine.outcome import TrainResult
from detrellis.engine.train import TrainRun
from detrellis.errors import UserError
from detrellis.study.rows import plan_schemes

from ..small import SMALL
from .test_resume import assert_same_run, same, stop_at

SETTINGS = [
    *SMALL,
    "data.size=[64, 64]",
    "optim.batch_size=8",
    "schedule.patience=2",
    "schedule.keep_best=2",
]
STEPS, EPOCHS = 2, 6  # 11 images
AP = (0.1, 0.3, 0.3, 0.2, 0.4, 0.5)  # of each epoch


@pytest.fixture(scope="module", autouse=True)
def scripted() -> Iterator[None]:
    save_best = TrainRun._save_best
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TrainRun,
            "_save_best",
            lambda self, ap, *found: save_best(self, AP[self.state.epoch], *found),
        )
        yield


def run(data: Path, out: Path) -> TrainResult:
    return detrellis.train("tiny", data=data, out=out, override=SETTINGS, epochs=EPOCHS, workers=0)


@pytest.fixture(scope="module")
def early(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ends after its fourth epoch."""
    result = run(shapes, tmp_path_factory.mktemp("early") / "run")
    assert (result.finished, result.early, result.epochs, result.signal, result.best) == (
        True,
        True,
        4,
        None,
        0.3,
    )
    return result.run


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "best").iterdir())


def test_a_run_ends_when_its_ap_rises_no_more(early: Path) -> None:
    rows = [r for r in read_records(early / "metrics.jsonl") if r["kind"] == "epoch"]
    assert [r["epoch"] for r in rows] == [1, 2, 3, 4]
    # As of any last epoch
    assert [r["after_nms"] is not None for r in rows] == [False, False, False, True]


def test_the_best_weights_are_kept_and_can_be_used(early: Path, tmp_path: Path) -> None:
    """Of equals the earlier; the best of them is `best.safetensors`."""
    assert kept(early) == ["epoch-0002-ap-0.3000.safetensors", "epoch-0003-ap-0.3000.safetensors"]
    first, second = (early / "best" / name for name in kept(early))
    assert same(load_file(first), load_file(early / "best.safetensors"))
    assert not same(load_file(first), load_file(second))
    assert load_weights(second)[1].epoch == 3
    picture = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(picture)
    assert len(detrellis.predict(second, picture)) == 1
    result = detrellis.evaluate(second, workers=0)
    assert result.to_dict()["stats"] == load_weights(second)[1].stats


def test_a_stopped_run_keeps_the_same_and_ends_with_the_same(
    shapes: Path, early: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3 * STEPS + 1)
        assert not run(shapes, tmp_path / "run").finished
    resumed = detrellis.resume(tmp_path / "run", workers=0)
    assert (resumed.finished, resumed.early, resumed.epochs) == (True, True, 4)
    assert_same_run(early, tmp_path / "run")
    assert kept(tmp_path / "run") == kept(early)


def test_a_run_that_ended_early_says_so_and_goes_on_without_patience(
    early: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(early, out)
    assert detrellis.resume(out, workers=0).epochs == 4
    said = capsys.readouterr().out
    assert "stopped early, after epoch 4 of 6: the last 2 evaluations had no higher AP" in said
    assert f"detrellis train --resume {out} -o schedule.patience=0" in said
    result = detrellis.resume(out, override="schedule.patience=0", workers=0)
    assert (result.finished, result.early, result.epochs, result.best) == (True, False, 6, 0.5)
    assert kept(out) == ["epoch-0005-ap-0.4000.safetensors", "epoch-0006-ap-0.5000.safetensors"]


@pytest.mark.parametrize("field", ["patience", "keep_best"])
def test_what_goes_by_ap_needs_images_to_evaluate_on(
    shapes: Path, tmp_path: Path, field: str
) -> None:
    alone = {"train": shapes / "annotations" / "instances_train.json", "out": tmp_path / "run"}
    with pytest.raises(
        UserError, match=f"schedule.{field} goes by AP, and the data set has no validation split"
    ):
        detrellis.train("tiny", override=[*SMALL, f"schedule.{field}=1"], workers=0, **alone)


def test_a_study_has_no_early_stopping(shapes: Path) -> None:
    with pytest.raises(
        UserError, match=r"schedule\.patience: a study compares rows of given lengths"
    ):
        plan_schemes(
            "tiny", "none,align", find_data(shapes), seeds=(0,), override=["schedule.patience=3"]
        )
