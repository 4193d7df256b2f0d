"""The folder of `predict --crops`: a picture of each detection, in a folder for each class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from detrellis.outputs import Outputs, jpeg
from detrellis.predictions.record import Prediction

CROPS = "crops"  # the folder of the crops, below that of the predictions


class CropFolder:
    """`OUT/crops/CLASS/NAME-NUMBER.jpg`; number 1 is the picture's best detection."""

    def __init__(self, out: Path, inputs: Iterable[Path]) -> None:
        """Raises `UserError` where the folder holds anything but what an earlier call left,
        or an input.
        """
        self.outputs = Outputs(out / CROPS)
        self.outputs.alone(inputs)

    def start(self) -> None:
        """Removes what an earlier call left."""
        self.outputs.clear()

    def add(self, name: str, prediction: Prediction, folders: Sequence[str]) -> None:
        """Writes the detections of the picture `name`,
        each with all pixels that its box touches; `folders` are those of the classes."""
        if not prediction.boxes:
            return
        image = prediction.image()
        for number, (label, (x1, y1, x2, y2)) in enumerate(
            zip(prediction.labels, prediction.boxes, strict=True), start=1
        ):
            left, top = min(math.floor(x1), image.width - 1), min(math.floor(y1), image.height - 1)
            crop = image.crop(
                (left, top, max(math.ceil(x2), left + 1), max(math.ceil(y2), top + 1))
            )
            self.outputs.write(f"{folders[label]}/{name}-{number}.jpg", jpeg(crop))


def folder_names(classes: Sequence[str]) -> list[str]:
    """What the folder of each class is called, on any file system:
    all different, none hidden, none a path.
    """
    names: list[str] = []
    taken: set[str] = set()
    for number, text in enumerate(classes):
        plain = "".join("_" if c in '<>:"/\\|?*' or not c.isprintable() else c for c in text).strip(
            " ."
        )
        name = plain or f"class_{number}"
        while name.casefold() in taken:
            name = f"{name}_{number}"
        taken.add(name.casefold())
        names.append(name)
    return names
