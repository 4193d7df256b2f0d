"""The folder of `predict --format`: label files, and copies of the pictures that they are about.

It is a data set by itself, which can be moved to where people label. As it is read as a whole, it
holds nothing else: labels that were corrected in it since are never written over.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from detrellis.arguments import LabelFormat
from detrellis.data.classes import ClassMap
from detrellis.data.files import is_image
from detrellis.outputs import Outputs, jpeg
from detrellis.predictions.inputs import InputPicture
from detrellis.predictions.label_formats import FORMATS, IMAGES, LabelledPicture
from detrellis.predictions.record import Prediction


class LabelFolder:
    """`OUT/FORMAT`, in which `add` puts one picture after the other, and `write` their labels."""

    def __init__(self, out: Path, kind: LabelFormat, inputs: Iterable[Path]) -> None:
        """Raises `UserError` where the folder holds anything but what an earlier call left,
        or an input.
        """
        self.kind, self.outputs = kind, Outputs(out / kind)
        self.outputs.alone(inputs)
        self._pictures: list[LabelledPicture] = []
        self._folder = "JPEGImages" if kind == "voc" else IMAGES

    def start(self) -> None:
        """Removes what an earlier call left."""
        self.outputs.clear()

    def add(self, picture: InputPicture, name: str, image_id: int, prediction: Prediction) -> None:
        """Copies a picture; one without a file,
        or without an image's suffix, becomes a PNG, a video's frame a JPEG.
        """
        source = picture.path if picture.path is not None and is_image(picture.path) else None
        # Not `with_suffix`: names such as "photo.jpg" tell pictures apart that differ in their
        # suffix alone.
        made = ".png" if prediction.frame is None else ".jpg"
        file = f"{name}{made if source is None else source.suffix}"
        self._pictures.append(LabelledPicture(file, image_id, replace(prediction, pixels=None)))
        place = f"{self._folder}/{file}"
        if source is not None:
            self.outputs.write_with(place, partial(shutil.copyfile, source))
        else:
            self.outputs.write(
                place,
                _png(prediction.image()) if prediction.frame is None else jpeg(prediction.image()),
            )

    def write(self, classes: ClassMap) -> None:
        """Writes the label files of all pictures."""
        for name, text in FORMATS[self.kind](self._pictures, classes).items():
            self.outputs.write(name, text)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()
