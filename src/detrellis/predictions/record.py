"""The detections of a picture or a video's frame, in the forms that other tools read;
and what could not be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detrellis.data.decode import REMEDY, read_image
from detrellis.errors import UserError
from detrellis.predictions.video import read_frame
from detrellis.rle import decode
from detrellis.rle import polygons as outlines
from detrellis.visualize.detections import draw_detections

SHOWN = 5  # broken pictures that one message lists


@dataclass(frozen=True)
class Prediction:
    """Detections of one picture or frame, with names and the data set's own category ids;
    best first.
    """

    path: Path | None  # None: the picture was given as an array, an image or a tensor
    size: tuple[int, int]  # height, width
    scores: list[float]
    names: list[str]
    labels: list[int]  # class index 0..C-1
    category_ids: list[int]
    boxes: list[tuple[float, float, float, float]]  # x1, y1, x2, y2 in pixels
    # (3, H, W) uint8 of a picture without path
    pixels: Tensor | None = field(default=None, repr=False, compare=False)
    # COCO's run lengths of each, where there are masks
    runs: tuple[bytes, ...] | None = field(default=None, repr=False)
    frame: int | None = None  # the number of the frame, from 0, where `path` is a video
    time: float | None = None  # its seconds there

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """The masks of all detections `(n, height, width)`; None where the detector gives none.

        They are unpacked here: of a large photograph, take them one by one with `mask`.
        """
        if self.runs is None:
            return None
        return np.array([*map(self.mask, range(len(self.runs)))], dtype=np.bool_).reshape(
            -1, *self.size
        )

    def mask(self, number: int) -> NDArray[np.bool_]:
        """The mask of one detection `(height, width)`."""
        assert self.runs is not None, "the detector gives no masks"
        return decode(self.runs[number], self.size)

    def to_coco(self, image_id: int, *, polygons: bool = False) -> list[dict[str, Any]]:
        """The detections as COCO results, which tools for it read,
        with the file's and the class's name added.

        Masks are run lengths, or `polygons` along the pixels' edges, in which holes are filled. Of
        a video, `frame` and `time` (seconds) are added as well.
        """
        at = {} if self.frame is None else {"frame": self.frame, "time": self.time}
        rows = zip(
            self.scores,
            self.names,
            self.category_ids,
            self.boxes,
            self._segmentations(polygons),
            strict=True,
        )
        return [
            {
                "image_id": image_id,
                "category_id": category,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
                "category_name": name,
                "file_name": None if self.path is None else str(self.path),
            }
            | at
            | segmentation
            for score, name, category, (x1, y1, x2, y2), segmentation in rows
        ]

    def _segmentations(self, polygons: bool) -> list[dict[str, Any]]:
        """The field of each detection; empty without masks."""
        if self.runs is None:
            return [{} for _ in self.scores]
        if polygons:
            return [
                {"segmentation": outlines(self.mask(number))} for number in range(len(self.runs))
            ]
        return [
            {"segmentation": {"size": [*self.size], "counts": runs.decode()}} for runs in self.runs
        ]

    def to_yolo(self) -> str:
        """YOLO text: a line `class cx cy w h score` for each detection,
        relative to the picture's width and height.
        """
        height, width = self.size
        rows = zip(self.labels, self.boxes, self.scores, strict=True)
        return "".join(
            f"{label} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
            f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f} {score:.6f}\n"
            for label, (x1, y1, x2, y2), score in rows
        )

    def to_supervision(self) -> Any:
        """The detections as `supervision.Detections`:
        `xyxy`, `confidence`, `class_id`, `mask`, and `data["class_name"]`.

        Raises `UserError` where supervision is missing.
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError(
                f"supervision is missing ({error})", 'pip install "detrellis[viz]"'
            ) from None
        return supervision.Detections(
            xyxy=np.array(self.boxes, dtype=np.float32).reshape(-1, 4),
            confidence=np.array(self.scores, dtype=np.float32),
            class_id=np.array(self.labels, dtype=np.int64),
            mask=self.masks,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_fiftyone(self) -> Any:
        """The detections as `fiftyone.Detections`, for a field of a sample:
        `label`, `confidence`, `bounding_box`, and the `mask` within it.

        Raises `UserError` where FiftyOne is missing.
        """
        try:
            import fiftyone
        except ImportError as error:
            raise UserError(f"fiftyone is missing ({error})", "pip install fiftyone") from None
        height, width = self.size
        detections = []
        for i, (x1, y1, x2, y2) in enumerate(self.boxes):
            mask = (
                None
                if self.runs is None
                else self.mask(i)[round(y1) : round(y2), round(x1) : round(x2)]
            )
            box = [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height]
            columns = {"label": self.names[i], "confidence": self.scores[i], "bounding_box": box}
            detections.append(
                fiftyone.Detection(**columns, mask=mask if mask is not None and mask.size else None)
            )
        return fiftyone.Detections(detections=detections)

    def image(self) -> Image.Image:
        """The picture itself, RGB; of a file, read again:
        a frame, from the start of its video on.
        """
        pixels = self.pixels
        if pixels is None:
            assert self.path is not None
            pixels = (
                read_image(self.path) if self.frame is None else read_frame(self.path, self.frame)
            )
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def draw(self, class_names: Sequence[str], *, same_size: bool = False) -> Image.Image:
        """The picture with boxes, masks, names and scores drawn on it; `class_names` are those of
        all classes, in order. Small pictures are enlarged and a legend stands below, but where it
        must keep the `same_size`."""
        image, marks = self.image(), (self.boxes, self.labels, self.scores, class_names)
        if not same_size:
            return draw_detections(image, *marks, masks=self.runs)
        drawn = draw_detections(image, *marks, masks=self.runs, min_side=1, legend=False)
        return drawn.crop((0, 0, *image.size))  # without the margin that a strip gets


@dataclass(frozen=True)
class UnreadablePicture:
    """A picture or video that could not be read, or not to its end, and why."""

    path: Path
    why: str  # names the file
    remedy: str

    @classmethod
    def of(cls, path: Path, error: UserError) -> UnreadablePicture:
        """From what a reader said; where its remedy speaks of data sets, another one is taken."""
        remedy = (
            "Replace or re-export the file, or leave it out."
            if error.remedy == REMEDY
            else error.remedy
        )
        return cls(path, error.message, remedy)


class Predictions(list[Prediction]):
    """The predictions of all pictures that could be read, in order; `failures` are the others."""

    def __init__(
        self, predictions: Iterable[Prediction] = (), failures: Iterable[UnreadablePicture] = ()
    ) -> None:
        super().__init__(predictions)
        self.failures = list(failures)


OnError = Literal["raise", "skip"] | Callable[["UnreadablePicture"], None]


def collect_predictions(
    results: Iterable[Prediction | UnreadablePicture],
    on_error: OnError,
    on_prediction: Callable[[Prediction], object] | None = None,
) -> Predictions:
    """All results, the broken pictures apart: in `failures`, raised at the end, or passed to a
    function as they come. With `on_prediction`, predictions are passed to it, and not kept.

    Raises `BrokenPictures` at the end where `on_error` is "raise" and a picture could not be read.
    """
    predictions = Predictions()
    for result in results:
        if isinstance(result, Prediction) and on_prediction is not None:
            on_prediction(result)
            continue
        if isinstance(result, Prediction):
            # A video's frames would not fit into memory.
            predictions.append(result if result.frame is None else replace(result, pixels=None))
            continue
        predictions.failures.append(result)
        if callable(on_error):
            on_error(result)
    if on_error == "raise" and predictions.failures:
        raise BrokenPictures(predictions)
    return predictions


class BrokenPictures(UserError):
    """Some pictures could not be read;
    `predictions` are those of the others, and nothing of them is lost.
    """

    def __init__(self, predictions: Predictions) -> None:
        failures = predictions.failures
        listed = "\n".join(f.why for f in failures[:SHOWN])
        more = f"\nand {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        given = {p.path for p in predictions if p.frame is not None} | {f.path for f in failures}
        total = len(given) + sum(p.frame is None for p in predictions)
        count = f"{len(failures)} of {total} pictures could not be read\n"
        message = listed if len(failures) == 1 else f"{count}{listed}{more}"
        super().__init__(message, " ".join(dict.fromkeys(f.remedy for f in failures)))
        self.predictions = predictions
