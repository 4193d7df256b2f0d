"""What a model is shown in training: augmented pictures with the boxes that are left, as one sheet."""

from __future__ import annotations

from PIL import Image

from detrellis.data.annotations import Annotations
from detrellis.data.augmentation import Strong, augmentation
from detrellis.data.loader import DetectionDataset
from detrellis.data.transforms import train_transform
from detrellis.recipes.config import Recipe
from detrellis.visualize import contact_sheet, draw_detections

SHEET = "train_samples.jpg"  # in the folder of a run
CELL = 320  # pixels of a picture's long side


def training_dataset(annotations: Annotations, recipe: Recipe, seed: int) -> DetectionDataset:
    """The pictures of a run, augmented as its recipe says."""
    data = recipe.data
    usual, strong = train_transform(**data.usual()), Strong(**data.strong())
    augmented = augmentation(usual, strong, epochs=recipe.schedule.epochs, calm=data.calm)
    return DetectionDataset(annotations, augmented, seed, masks=recipe.needs_masks)


def samples_sheet(annotations: Annotations, recipe: Recipe, seed: int, count: int) -> Image.Image:
    """The first `count` pictures of the first epoch, evenly spaced over the data set, with their boxes drawn.

    Raises `UserError` where one of them cannot be read.
    """
    dataset, total = training_dataset(annotations, recipe, seed), len(annotations)
    chosen = [number * total // min(count, total) for number in range(min(count, total))]
    drawn = []
    for index in chosen:
        sample = dataset[0, index]
        picture = Image.fromarray(sample.image.permute(1, 2, 0).contiguous().numpy())
        names = annotations.classes.names
        drawn.append(draw_detections(picture, sample.boxes, sample.labels, names=names, min_side=CELL, legend=False))
    return contact_sheet(drawn, cell=CELL)
