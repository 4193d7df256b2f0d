"""A run stores mean and std of its backbone's weights,
and everything that reads pictures goes by them.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console

import detrellis
from detrellis.analysis.pictures import picture
from detrellis.data.batch import Normalise
from detrellis.data.decode import read_image
from detrellis.distributed import World
from detrellis.engine.checkpoint import load_weights
from detrellis.engine.evaluate import EvalOptions
from detrellis.interop.convert import processor
from detrellis.interop.huggingface import FAMILIES
from detrellis.interop.load import with_processor
from detrellis.loading import open_split
from detrellis.recipes import find_recipe
from detrellis.types import IMAGENET_MEAN

from ..small import SMALL

GREY = (0.5, 0.5, 0.5)  # what timm's test_resnet is given
OTHER = (0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run from pretrained weights in a file, the file, and what was said."""
    folder, said = tmp_path_factory.mktemp("run"), io.StringIO()
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "weights.pth")
    wanted = [
        "detector.backbone.pretrained=true",
        f"detector.backbone.weights={folder / 'weights.pth'}",
    ]
    options: dict[str, Any] = {
        "override": [*SMALL, *wanted, "data.size=[64, 64]"],
        "epochs": 1,
        "workers": 0,
    }
    detrellis.train(
        "tiny", data=shapes, out=folder / "run", console=Console(file=said, width=500), **options
    )
    return folder / "run", folder / "weights.pth", said.getvalue()


def test_the_source_is_said_and_stored(run: tuple[Path, Path, str]) -> None:
    place, file, said = run
    card = load_weights(place)[1]
    assert card.backbone == f"file {file}"
    assert f"pretrained weights: file {file}" in said
    assert (card.recipe.data.mean, card.recipe.data.std) == (GREY, GREY)


def test_pictures_are_read_as_in_training(run: tuple[Path, Path, str], shapes: Path) -> None:
    """Evaluation, figures and prediction,
    and a run that starts from this one and names no statistics.
    """
    place = run[0]
    with open_split(place, World(0, 1, torch.device("cpu")), EvalOptions(workers=0)) as opened:
        batch = next(iter(opened.loader))
        root, names = opened.annotations.root, opened.annotations.file_names
        image = read_image(Path(root, names[0].decode()))
        torch.testing.assert_close(
            batch.images.pixels[0], (image / 255 - 0.5) / 0.5, atol=1e-6, rtol=0
        )
        assert torch.equal(
            torch.from_numpy(picture(batch, 0, opened.model.normalise).pixels), image.movedim(0, -1)
        )
        with torch.no_grad():
            (expected,) = opened.model.detector.eval().detect(
                batch.images._replace(pixels=batch.images.pixels[:1]), batch.sizes[:1]
            )
    (found,) = detrellis.predict(place, [image], threshold=0.0)
    torch.testing.assert_close(torch.tensor(found.scores), expected.scores, atol=1e-5, rtol=0)
    options: dict[str, Any] = {
        "override": [*SMALL, "data.size=[64, 64]"],
        "epochs": 1,
        "workers": 0,
    }
    tuned = detrellis.train(
        "tiny", weights=place, data=shapes, out=place.parent / "tuned", **options
    )
    card = load_weights(tuned.run)[1]
    assert (card.recipe.data.mean, card.backbone) == (GREY, None)


def test_a_processor_holds_the_statistics(tmp_path: Path) -> None:
    recipe = find_recipe("detr-r50")
    for changed, mean in (
        (recipe, IMAGENET_MEAN),
        (recipe.override(f"data.mean={list(OTHER)}"), OTHER),
    ):
        config = processor(FAMILIES["detr"], changed)
        assert config["image_mean"] == list(mean)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
        back = with_processor(recipe, tmp_path / "preprocessor_config.json").data
        assert Normalise.of(**back.statistics()) == Normalise.of(**changed.data.statistics())
