"""A small detector with random weights, as a model and as a run on disk, and pictures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detrellis.data.classes import ClassMap
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import save_weights
from detrellis.predictions.model import Model
from detrellis.recipes.build import build
from tests.small import small

CLASSES = ClassMap((1, 3, 7), ("cat", "dog", "bird"))


def picture(height: int = 40, width: int = 64, seed: int = 0) -> np.ndarray:
    """Coloured patches, `(H, W, 3)`."""
    coarse = np.random.default_rng(seed).integers(
        0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8
    )
    return coarse.repeat(8, 0).repeat(8, 1)[:height, :width]


def save(path: Path, *, seed: int = 0, height: int = 40, width: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(height, width, seed)).save(path)
    return path


@pytest.fixture(scope="session")
def model() -> Model:
    recipe = small("tiny", ["none"]).override(["data.size=64", "data.augment=detr"])
    detector = build(recipe, len(CLASSES)).detector.eval()
    return Model(detector, recipe, CLASSES, torch.device("cpu"))


@pytest.fixture(scope="session")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_weights(
        folder / "best.safetensors", model.detector.state_dict(), Card(model.recipe, CLASSES, {})
    )
    return folder
