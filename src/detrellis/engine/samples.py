"""What a model is shown in training:
augmented pictures with the boxes that are left, as one sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detrellis.data.annotations import Annotations
from detrellis.data.augmentation import Augmentation, Strong, augmentation
from detrellis.data.dataset import DetectionDataset
from detrellis.data.lsj import LargeScale, LargeScaleJitter
from detrellis.data.sampler import expected, images_by_class, repeat_factors
from detrellis.data.transforms import Finish, Transform, detr_between, train_transform
from detrellis.recipes.config import Recipe
from detrellis.recipes.data import DataConfig
from detrellis.rle import encode
from detrellis.visualize.detections import draw_detections
from detrellis.visualize.sheets import contact_sheet

SHEET = "train_samples.jpg"  # in the folder of a run
CELL = 320  # pixels of a picture's long side


def training_dataset(
    annotations: Annotations, recipe: Recipe, seed: int, *, unreadable: Path | None = None
) -> DetectionDataset:
    """The pictures of a run, augmented as its recipe says;
    `unreadable` as in `DetectionDataset`.
    """
    masks, bitmaps = recipe.needs_masks, recipe.needs_bitmaps
    return DetectionDataset(
        annotations,
        augmentation_of(recipe),
        seed,
        masks=masks,
        bitmaps=bitmaps,
        unreadable=unreadable,
    )


def augmentation_of(recipe: Recipe) -> Augmentation:
    """What the recipe's pictures go through."""
    data = recipe.data
    return augmentation(
        _usual(data), Strong(**data.strong()), epochs=recipe.schedule.epochs, calm=data.calm
    )


def _usual(data: DataConfig) -> Transform:
    """The augmentation of the last epochs, and of all without a strong one."""
    finish = Finish(data.hflip, data.vflip, data.jitter or 0.0)
    if data.augment == "lsj":
        assert not isinstance(data.size, int)
        return LargeScaleJitter(data.size[0], LargeScale(**data.large_scale()), finish, data.pad)
    if data.sides is not None:
        return detr_between(data.sides, data.sides_max or data.max_side, finish)
    return train_transform(**data.usual())


def image_factors(annotations: Annotations, recipe: Recipe) -> NDArray[np.float64] | None:
    """How often each image should be seen in an epoch, `(I,)`; None: each once."""
    threshold = recipe.data.repeat_threshold
    return (
        repeat_factors(*counted_labels(annotations), len(annotations.classes), threshold)
        if threshold
        else None
    )


def class_counts(annotations: Annotations) -> NDArray[np.int64]:
    """How many images have each class, `(C,)`."""
    return images_by_class(*counted_labels(annotations), len(annotations.classes))


def counted_labels(annotations: Annotations) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each image's labels begin, and all of them, without crowd regions."""
    counted = ~annotations.crowd
    return np.concatenate([[0], np.cumsum(counted)])[annotations.starts], annotations.labels[
        counted
    ]


def images_an_epoch(annotations: Annotations, recipe: Recipe) -> int:
    """How many images an epoch has, those that it has several times included."""
    factors = image_factors(annotations, recipe)
    return len(annotations) if factors is None else expected(factors)


def samples_sheet(dataset: DetectionDataset, names: Sequence[str], count: int) -> Image.Image:
    """`count` pictures as the first epoch has them,
    evenly spaced over the data set, with the classes' `names`.

    Raises `UserError` where one of them cannot be read.
    """
    count = min(count, len(dataset))
    drawn = []
    for index in (number * len(dataset) // count for number in range(count)):
        sample = dataset[0, index]
        picture = Image.fromarray(sample.image.permute(1, 2, 0).contiguous().numpy())
        masks = (
            None if sample.bitmaps is None else [encode(mask) for mask in sample.bitmaps.numpy()]
        )
        options: dict[str, Any] = {
            "names": names,
            "masks": masks,
            "min_side": CELL,
            "legend": False,
        }
        drawn.append(draw_detections(picture, sample.boxes, sample.labels, **options))
    return contact_sheet(drawn, cell=CELL)
