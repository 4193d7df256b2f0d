"""The sheet of what training sees."""

from __future__ import annotations

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

from ..small import SMALL

SETTINGS = [*SMALL, "data.size=[64, 64]", "data.hflip=1", "data.jitter=0", "data.zoom=[1, 1]"]


def test_pictures_are_drawn_as_they_are_trained_on(shapes: Path) -> None:
    training, *_ = prepare(find_data(shapes))
    recipe = find_recipe("tiny").override(SETTINGS)
    sheet = samples_sheet(training, recipe, 0, 1)
    assert max(sheet.size) >= CELL
    # Flipped, as the recipe has it: the picture, apart from the lines of its boxes, is that of the data set.
    shown = training_dataset(training, recipe, 0)[0, 0]
    plain = training_dataset(training, recipe.override("data.hflip=0"), 0)[0, 0]
    assert (shown.image == plain.image.flip(-1)).all()
    pixel = sheet.getpixel((sheet.width // 2, sheet.height - 3))
    assert isinstance(pixel, tuple)


def test_a_small_data_set_has_a_small_sheet(shapes: Path) -> None:
    training, *_ = prepare(find_data(shapes))
    recipe = find_recipe("tiny").override(SETTINGS)
    few, many = samples_sheet(training, recipe, 0, 4), samples_sheet(training, recipe, 0, 100)
    assert many.width * many.height > few.width * few.height
    assert samples_sheet(training, recipe, 0, 11).size == many.size  # all that there are


def test_a_run_has_its_sheet_and_check_draws_one(shapes: Path, tmp_path: Path) -> None:
    run = detrellis.train("tiny", data=shapes, out=tmp_path / "run", override=SETTINGS, epochs=1, workers=0).run
    with Image.open(run / "train_samples.jpg") as sheet:
        assert sheet.width > CELL
    out = tmp_path / "sheets"
    assert draw_samples(find_recipe("tiny").override(SETTINGS), shapes, 4, out) == out / "train_samples.jpg"
    (out / "train_samples.jpg").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="train_samples"):
        draw_samples(find_recipe("tiny"), shapes, 4, out)
    assert (out / "train_samples.jpg").read_bytes() == b"somebody's"
