"""What a detector finds in a picture, in the forms that others read; and what becomes of a picture that is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from detrellis.data.decode import REMEDY, read_image
from detrellis.errors import UserError
from detrellis.visualize import draw_detections

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 5  # broken pictures that one message lists


@dataclass(frozen=True)
class Prediction:
    """Detections of one picture, with names and the data set's own category ids; best first."""

    path: Path | None  # None: the picture was given as an array, an image or a tensor
    size: tuple[int, int]  # height, width
    scores: list[float]
    names: list[str]
    labels: list[int]  # class index 0..C-1
    category_ids: list[int]
    boxes: list[tuple[float, float, float, float]]  # x1, y1, x2, y2 in pixels
    pixels: Tensor | None = field(default=None, repr=False, compare=False)  # (3, H, W) uint8 of a picture without path

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO results, which tools for it read, each with the file's and the class's name added."""
        rows = zip(self.scores, self.names, self.category_ids, self.boxes, strict=True)
        return [
            {
                "image_id": image_id,
                "category_id": category,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
                "category_name": name,
                "file_name": None if self.path is None else str(self.path),
            }
            for score, name, category, (x1, y1, x2, y2) in rows
        ]

    def to_yolo(self) -> str:
        """YOLO text: a line `class cx cy w h score` for each detection, relative to the picture's width and height."""
        height, width = self.size
        rows = zip(self.labels, self.boxes, self.scores, strict=True)
        return "".join(
            f"{label} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
            f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f} {score:.6f}\n"
            for label, (x1, y1, x2, y2), score in rows
        )

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`: `xyxy`, `confidence`, `class_id`, and `data["class_name"]`.

        Raises `UserError` where supervision is missing.
        """
        import numpy as np

        try:
            import supervision
        except ImportError as error:
            raise UserError(f"supervision is missing ({error})", 'pip install "detrellis[viz]"') from None
        return supervision.Detections(
            xyxy=np.array(self.boxes, dtype=np.float32).reshape(-1, 4),
            confidence=np.array(self.scores, dtype=np.float32),
            class_id=np.array(self.labels, dtype=np.int64),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, class_names: Sequence[str]) -> Image:
        """The picture with boxes, names and scores."""
        from PIL import Image

        if self.pixels is not None:
            pixels = self.pixels
        else:
            assert self.path is not None
            pixels = read_image(self.path)
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        return draw_detections(picture, self.boxes, self.labels, self.scores, class_names)


@dataclass(frozen=True)
class Failure:
    """A picture that could not be read, and why."""

    path: Path
    why: str  # names the file
    remedy: str

    @classmethod
    def of(cls, path: Path, error: UserError) -> Failure:
        """What a reader said; it speaks of data sets where it knows no other way."""
        remedy = "Replace or re-export the file, or leave it out." if error.remedy == REMEDY else error.remedy
        return cls(path, error.message, remedy)


class Predictions(list[Prediction]):
    """The predictions of all pictures that could be read, in order; `failures` are the others."""

    def __init__(self, found: Iterable[Prediction] = (), failures: Iterable[Failure] = ()) -> None:
        super().__init__(found)
        self.failures = list(failures)


OnError = Literal["raise", "skip"] | Callable[["Failure"], None]


def collected(found: Iterable[Prediction | Failure], on_error: OnError) -> Predictions:
    """All of them, the broken ones apart: in `failures`, raised at the end, or told to a function as they come."""
    predictions = Predictions()
    for one in found:
        if isinstance(one, Prediction):
            predictions.append(one)
            continue
        predictions.failures.append(one)
        if callable(on_error):
            on_error(one)
    if on_error == "raise" and predictions.failures:
        raise BrokenPictures(predictions)
    return predictions


class BrokenPictures(UserError):
    """Some pictures could not be read; `predictions` are those of the others, and nothing of them is lost."""

    def __init__(self, predictions: Predictions) -> None:
        failures = predictions.failures
        listed = "\n".join(f.why for f in failures[:SHOWN])
        more = f"\nand {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        count = f"{len(failures)} of {len(predictions) + len(failures)} pictures could not be read\n"
        message = listed if len(failures) == 1 else f"{count}{listed}{more}"
        super().__init__(message, " ".join(dict.fromkeys(f.remedy for f in failures)))
        self.predictions = predictions
