"""A detector with what it needs to look at pictures: its recipe's resizing, and the names of its classes."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from detrellis.arguments import BatchSize, Iou, Score, checked
from detrellis.data.classes import ClassMap
from detrellis.data.loader import stack_images
from detrellis.data.transforms import Transform, eval_transform
from detrellis.detector import Detector, evaluating
from detrellis.errors import UserError
from detrellis.predictions.inputs import Given, Pictures, find_pictures
from detrellis.predictions.record import Failure, OnError, Prediction, Predictions, collected
from detrellis.recipes import Recipe
from detrellis.types import Detections

WINDOW = 4  # batches' worth of pictures among which those of one size are looked for


@dataclass
class Model:
    """A detector that knows its recipe and its classes."""

    detector: Detector
    recipe: Recipe
    classes: ClassMap
    device: torch.device
    data: Mapping[str, Any] | None = None  # the `DataSource` it was trained on, as `to_dict` gives it

    @checked
    def predict(
        self,
        pictures: Pictures,
        *,
        threshold: Score = 0.3,
        nms: Iou | None = None,
        batch_size: BatchSize = 1,
        recursive: bool = False,
        on_error: OnError = "raise",
    ) -> Predictions:
        """Detections scoring at least `threshold`, in order: of files, folders, patterns, arrays, images and tensors.

        `predictions/inputs.py` says what is taken; `recursive` looks into the folders of folders. `nms` drops what
        overlaps a better detection of its class by more than that IoU: for a detector that was trained too shortly to
        keep one query for each object. `batch_size` pictures of one size go through the detector at a time, which
        changes nothing but rounding.

        A picture that is broken does not stop the others. At the end, `on_error="raise"` raises a `UserError` that has
        all the others in its `predictions`; `"skip"` leaves the broken ones in `failures` of what is returned, and so
        does a function, which is called with each as it comes.
        """
        return collected(self.look(find_pictures(pictures, recursive), threshold, nms, batch_size), on_error)

    @checked
    def stream(self, pictures: Pictures, *, threshold: Score = 0.3, nms: Iou | None = None) -> Iterator[Prediction]:
        """As `predict`, one picture at a time, also of an iterator that has no end. Raises at a broken picture."""
        for one in self.look(find_pictures(pictures), threshold, nms, batch_size=1):
            if isinstance(one, Failure):
                raise UserError(one.why, one.remedy)
            yield one

    def look(
        self, pictures: Iterable[Given], threshold: float, nms: float | None, batch_size: int
    ) -> Generator[Prediction | Failure]:
        """What is found in each picture, or why it cannot be read, in order."""
        data = self.recipe.data
        transform = eval_transform(data.size, **data.resizing())
        pictures = iter(pictures)
        while window := list(itertools.islice(pictures, 1 if batch_size == 1 else WINDOW * batch_size)):
            ready = [_ready(given, transform) for given in window]
            found: dict[int, Detections] = {}
            for rows in _of_one_size(ready, batch_size):
                batch = [one for row in rows if isinstance(one := ready[row], _Ready)]
                found |= zip(rows, self._detect(batch, transform.pad_to, nms), strict=True)
            for row, (given, one) in enumerate(zip(window, ready, strict=True)):
                yield one if isinstance(one, Failure) else self._prediction(given, one.size, found[row], threshold)

    def _detect(self, batch: list[_Ready], pad_to: tuple[int, int] | None, nms: float | None) -> list[Detections]:
        """On the detector's own device, in its precision and in evaluation mode; all of these stay what they were."""
        like = next(self.detector.parameters())
        images = stack_images([one.image for one in batch], pad_to).to(like.device)
        sizes = torch.tensor([one.size for one in batch], device=like.device)
        half = like.dtype in (torch.float16, torch.bfloat16)
        if not half:
            images = images._replace(pixels=images.pixels.to(like.dtype))
        with evaluating(self.detector), torch.autocast(like.device.type, like.dtype if half else None, enabled=half):
            return replace(self.detector.postprocess, nms=nms)(self.detector(images), sizes)

    def _prediction(self, given: Given, size: tuple[int, int], found: Detections, threshold: float) -> Prediction:
        height, width = size
        boxes = found.boxes.cpu().float().clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        scores = found.scores.cpu().float()
        kept = scores >= threshold
        labels = found.labels.cpu()[kept].tolist()
        return Prediction(
            given.path,
            size,
            scores[kept].tolist(),
            [self.classes.names[i] for i in labels],
            labels,
            [self.classes.ids[i] for i in labels],
            [tuple(b) for b in boxes[kept].tolist()],
            given.pixels,
        )


@dataclass(frozen=True)
class _Ready:
    """A picture as the detector sees it, before it is normalised and padded."""

    image: Tensor  # (3, h, w) uint8
    size: tuple[int, int]  # height, width of the original


def _ready(given: Given, transform: Transform) -> _Ready | Failure:
    try:
        image = given.read()
    except UserError as error:
        assert given.path is not None
        return Failure.of(given.path, error)
    resized, _, _ = transform(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return _Ready(resized, (int(image.shape[1]), int(image.shape[2])))


def _of_one_size(ready: list[_Ready | Failure], most: int) -> Iterator[list[int]]:
    """Positions of pictures of the same size, at most so many at a time: padding would change what is found."""
    groups: dict[torch.Size, list[int]] = {}
    for row, one in enumerate(ready):
        if isinstance(one, _Ready):
            groups.setdefault(one.image.shape, []).append(row)
    for rows in groups.values():
        yield from (rows[i : i + most] for i in range(0, len(rows), most))
