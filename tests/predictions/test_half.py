"""Half precision at inference: where products are in bfloat16, and what refuses it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import detrellis
from detrellis import precision
from detrellis.cli import app
from detrellis.detector import Detector, evaluating
from detrellis.errors import UserError
from detrellis.loading import load
from detrellis.predictions.model import Model
from detrellis.serving.detector import open_served
from detrellis.types import DecoderOutput, ImageBatch

from ..small import SMALL
from .conftest import picture, save


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: True)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Whether autocast was on in the detector's forward passes."""
    found: set[bool] = set()
    forward = Detector.forward

    def watched(self: Detector, images: ImageBatch) -> DecoderOutput:
        found.add(torch.is_autocast_enabled("cpu"))
        return forward(self, images)

    monkeypatch.setattr(Detector, "forward", watched)
    return found


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("way", [{}, {"tta": "64,flip"}, {"tiles": 32}])
def test_predicts_in_it(run: Path, seen: set[bool], half: bool, way: dict[str, object]) -> None:
    detrellis.predict(run, [picture()], half=half, **way)  # type: ignore[arg-type]
    assert seen == {half}


@pytest.mark.usefixtures("bfloat16")
def test_finds_nearly_the_same(run: Path) -> None:
    single, half = (
        detrellis.predict(run, [picture()], half=half, threshold=0)[0] for half in (False, True)
    )
    assert sorted(half.scores) == pytest.approx(sorted(single.scores), abs=0.05)


@pytest.mark.usefixtures("bfloat16")
def test_serves_in_it(run: Path, seen: set[bool]) -> None:
    served = open_served(run, 0.3, half=True)
    served.detect([torch.from_numpy(picture()).permute(2, 0, 1)])
    assert seen == {True}


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("tta", [False, True])
def test_evaluates_in_it_and_leaves_the_report(
    shapes: Path, tmp_path: Path, seen: set[bool], tta: bool
) -> None:
    settings = [*SMALL, "data.size=[64, 64]", "optim.batch_size=4"]
    result = detrellis.train(
        "tiny", data=shapes, out=tmp_path / "run", override=settings, epochs=1, workers=0
    )
    report = (result.run / "report.json").read_bytes()
    seen.clear()
    detrellis.evaluate(result.run, half=True, tta=tta, workers=0)
    assert seen == {True}
    assert (result.run / "report.json").read_bytes() == report


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_are_halves_are_computed_with_as_such(
    model: Model, dtype: torch.dtype
) -> None:
    detector = copy.deepcopy(model.detector).to(dtype)
    with evaluating(detector):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == dtype


def test_devices_without_it_refuse_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: False)
    with pytest.raises(UserError, match="CPUs with AMX"):
        load(run, half=True)
    given = [str(run), str(save(tmp_path / "a.png")), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["predict", *given, "--half", "--device", "cpu"])
    assert "CPUs with AMX" in f"{result.exception} {result.stderr}"


@pytest.mark.usefixtures("bfloat16")
def test_exported_networks_refuse_it(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.touch()
    with pytest.raises(UserError, match="the precision of its file"):
        load(file, half=True)
