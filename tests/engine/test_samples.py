"""The sheet of what training sees."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

import detrellis
from detrellis.api import draw_samples
from detrellis.data.doctor.check import prepare
from detrellis.data.layout import find_data
from detrellis.engine.samples import CELL, samples_sheet, training_dataset
from detrellis.errors import UserError
from detrellis.recipes import find_recipe

from ..data.sets import CocoSet
from ..small import SMALL
from ..test_cli import call

SETTINGS = [*SMALL, "data.size=[64, 64]", "data.hflip=1", "data.jitter=0", "data.zoom=[1, 1]"]


def test_pictures_are_drawn_as_they_are_trained_on(shapes: Path) -> None:
    training, *_ = prepare(find_data(shapes))
    recipe = find_recipe("tiny").override(SETTINGS)
    sheet = samples_sheet(training_dataset(training, recipe, 0), training.classes.names, 1)
    assert max(sheet.size) >= CELL
    # Flipped, as the recipe has it: the picture, apart from the lines of its boxes, is that of the
    # data set.
    shown = training_dataset(training, recipe, 0)[0, 0]
    plain = training_dataset(training, recipe.override("data.hflip=0"), 0)[0, 0]
    assert (shown.image == plain.image.flip(-1)).all()
    pixel = sheet.getpixel((sheet.width // 2, sheet.height - 3))
    assert isinstance(pixel, tuple)


def test_a_small_data_set_has_a_small_sheet(shapes: Path) -> None:
    training, *_ = prepare(find_data(shapes))
    recipe = find_recipe("tiny").override(SETTINGS)
    dataset, names = training_dataset(training, recipe, 0), training.classes.names
    few, whole, more = (samples_sheet(dataset, names, count) for count in (4, 11, 100))
    assert whole.width * whole.height > few.width * few.height
    assert more.size == whole.size  # all that there are


def test_a_run_has_its_sheet_and_check_draws_one(shapes: Path, tmp_path: Path) -> None:
    run = detrellis.train(
        "tiny", data=shapes, out=tmp_path / "run", override=SETTINGS, epochs=1, workers=0
    ).run
    with Image.open(run / "train_samples.jpg") as sheet:
        assert sheet.width > CELL
    out = tmp_path / "sheets"
    assert (
        draw_samples(find_recipe("tiny").override(SETTINGS), shapes, 4, out)
        == out / "train_samples.jpg"
    )
    (out / "train_samples.jpg").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="train_samples"):
        draw_samples(find_recipe("tiny"), shapes, 4, out)
    assert (out / "train_samples.jpg").read_bytes() == b"somebody's"


def test_the_sheet_has_masks_where_every_object_has_one(tmp_path: Path) -> None:
    data, recipe = CocoSet(tmp_path / "set"), find_recipe("tiny").override(SETTINGS)
    masked = draw_samples(recipe, data.write(), 2, tmp_path / "masked").read_bytes()
    del data.box(0)["segmentation"]
    assert draw_samples(recipe, data.write(), 2, tmp_path / "plain").read_bytes() != masked


def test_nothing_is_drawn_of_a_data_set_with_errors(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    check = ["check", "--data", "data", "--show", "4", "--recipe", "tiny"]
    call(*check, capsys=capsys)
    Path("train_samples.jpg").unlink()
    next(Path("data").rglob("*.jpg")).unlink()
    assert "Nothing is drawn before the errors are put right" in call(*check, capsys=capsys, code=1)
    assert not Path("train_samples.jpg").exists()
