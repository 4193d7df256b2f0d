"""What earlier versions wrote is read: weights predict what they did, runs go on, recipes build."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import detrellis
from detrellis.engine.log import read_records
from detrellis.engine.resume import load_run
from detrellis.recipes import find_recipe
from detrellis.recipes.migrate import read_recipe

from .make import predicted

ARCHIVES = sorted(Path(__file__).parent.glob("*.tar.xz"))


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a version wrote."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_there_are_files_of_the_first_release() -> None:
    assert "0.2.0.tar.xz" in [path.name for path in ARCHIVES]


def test_weights_predict_what_they_did(written: Path) -> None:
    for name, before in json.loads((written / "predictions.json").read_text()).items():
        now = predicted(written / name)
        assert [row[0] for row in now] == [row[0] for row in before], name
        torch.testing.assert_close(
            torch.tensor(now), torch.tensor(before), atol=1e-3, rtol=1e-4, msg=name
        )


def test_recipes_are_read_and_are_the_same(written: Path) -> None:
    """Defaults may change, and what a card holds does not: each recipe is stored whole."""
    stored: dict[str, Any] = json.loads((written / "recipes.json").read_text())
    for name, recipe in stored["recipes"].items():
        read = read_recipe(recipe, stored["format"])
        assert read.name == find_recipe(name).name
        assert not lost(recipe, read.model_dump(mode="json")), name


def lost(stored: Any, now: Any, where: str = "") -> list[str]:
    """The fields of a stored recipe that have another value now, or are gone;
    new ones may have come.
    """
    if not isinstance(stored, dict):
        return [] if stored == now else [f"{where}: {stored} was stored, and is {now}"]
    if not isinstance(now, dict):
        return [f"{where}: is {now}"]
    return [
        text
        for name, value in stored.items()
        for text in lost(value, now.get(name, "gone"), f"{where}.{name}")
    ]


def test_a_run_goes_on_to_its_end(written: Path, shapes: Path) -> None:
    state, card = load_run(written / "run")
    assert (state["epoch"], card.recipe.schedule.epochs) == (1, 2)
    assert card.recipe.schemes.align is not None
    result = detrellis.resume(written / "run", data=shapes, workers=0, device="cpu")
    assert (result.finished, result.steps) == (True, 6)
    rows = [
        record["epoch"]
        for record in read_records(written / "run" / "metrics.jsonl")
        if record["kind"] == "epoch"
    ]
    assert rows == [1, 2]
    assert detrellis.load(written / "run" / "best.safetensors").classes == card.classes
    assert (written / "run" / "report.json").exists()
