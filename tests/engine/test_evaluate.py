"""What is detected in an image depends on the image alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detrellis.data.annotations import Annotations
from detrellis.data.doctor.check import prepare
from detrellis.data.layout import find_data
from detrellis.data.shapes import write_shapes
from detrellis.detector import Detector
from detrellis.distributed import World
from detrellis.engine.evaluate import collect, eval_loader
from detrellis.engine.views import read_views
from detrellis.recipes import Recipe, find_recipe
from detrellis.recipes.build import build
from tests.small import shrink

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Annotations:
    """Some of them upright, some lying."""
    source = find_data(write_shapes(tmp_path_factory.mktemp("d") / "s", train=1, val=9))
    _, annotations, *_ = prepare(source)
    assert annotations is not None
    assert len(np.unique(annotations.sizes, axis=0)) == 2
    return annotations


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return shrink(find_recipe("tiny")).override(["data.size=[48, 64]"])


@pytest.fixture(scope="module")
def detector(recipe: Recipe) -> Detector:
    torch.manual_seed(0)
    return build(recipe, 3).detector.eval()


def detections(
    images: Annotations, recipe: Recipe, detector: Detector, batch: int, processes: int = 1
) -> dict[int, np.ndarray]:
    """The rows of each image's detections, whichever process makes them."""
    rows: dict[int, np.ndarray] = {}
    for rank in range(processes):
        loader = eval_loader(images, recipe.data, batch, 0, World(rank, processes, CPU))
        (evaluator,) = collect(detector, loader, images, CPU)
        matrix = evaluator.arrays().rows
        for image in np.unique(matrix[:, 0]):
            assert image not in rows
            rows[int(image)] = matrix[matrix[:, 0] == image]
    return rows


@pytest.mark.parametrize(("batch", "processes"), [(2, 1), (4, 1), (99, 1), (2, 3)])
def test_neither_batch_nor_processes_matter(
    batch: int, processes: int, images: Annotations, recipe: Recipe, detector: Detector
) -> None:
    alone = detections(images, recipe, detector, 1)
    together = detections(images, recipe, detector, batch, processes)
    assert alone.keys() == together.keys()
    assert len(alone) == 9
    for image, rows in alone.items():
        np.testing.assert_allclose(together[image], rows, atol=1e-3, rtol=1e-4)


def test_nothing_is_padded(images: Annotations, recipe: Recipe) -> None:
    views = read_views("48,64,flip", recipe.data, None)
    assert views is not None
    for view in (None, *views.views):
        batches = list(eval_loader(images, recipe.data, 4, 0, World(0, 1, CPU), view))
        assert [batch.images.padding for batch in batches] == [None] * len(batches)
        assert max(len(batch.image_ids) for batch in batches) > 1
