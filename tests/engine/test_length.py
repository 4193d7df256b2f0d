"""How long a run is where the size of its data set decides."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import detrellis
from detrellis.cli import app
from detrellis.engine.checkpoint import load_weights
from detrellis.engine.length import auto_epochs
from detrellis.recipes import find_recipe

from ..small import SMALL


@pytest.mark.parametrize(
    ("images", "epochs"), [(1, 100), (96, 84), (205, 39), (1000, 12), (100_000, 12)]
)
def test_small_sets_get_the_steps_they_need(images: int, epochs: int) -> None:
    """In batches of 8."""
    assert auto_epochs(find_recipe("tiny"), images) == epochs


def test_the_number_it_became_is_said_and_stored(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detrellis.engine.length.STEPS", 5)
    monkeypatch.setattr("detrellis.engine.length.FEWEST", 1)
    run = tmp_path / "run"
    settings = [word for setting in (*SMALL, "data.size=[64, 64]") for word in ("-o", setting)]
    words = [
        "train",
        "tiny",
        "--data",
        str(shapes),
        "--out",
        str(run),
        "--epochs",
        "auto",
        "--workers",
        "0",
        *settings,
    ]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "--epochs auto: 3 epochs of 2 steps, 6 in all" in " ".join(result.output.split())
    card = load_weights(run / "last.safetensors")[1]
    assert (card.recipe.schedule.epochs, card.epoch, card.step) == (3, 3, 6)
    assert detrellis.resume(run, workers=0).steps == 6
