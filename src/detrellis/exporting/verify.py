"""Whether an exported network detects what the detector does that it was made from:
on pictures, and in AP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from detrellis.data.transforms import eval_transform
from detrellis.errors import UserError
from detrellis.predictions.inputs import find_pictures
from detrellis.predictions.model import Model
from detrellis.predictions.record import Prediction, UnreadablePicture
from detrellis.recipes.data import DataConfig

BATCHES = (1, 2, 5)
SCORE = 0.05  # detections from here on are compared
# What may differ: the score, and coordinates in fractions of the picture's longer side; in float32
# and in float16.
TOLERANCE = {False: (1e-3, 1e-3), True: (0.02, 0.01)}
AP_TOLERANCE = {False: 1e-3, True: 0.01}
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Pictures in batches of one size, through both."""

    batch: int
    pictures: int
    detections: int  # of both, with a score of `SCORE` or more
    unmatched: int  # that have no counterpart within the tolerance
    score: float  # largest difference of matched ones
    pixels: float  # the same of a coordinate


@dataclass(frozen=True)
class Verification:
    """All comparisons; `ap` and `exported_ap`:
    on the run's own validation split, None where it was not evaluated, and `why_not`.
    """

    rows: tuple[Comparison, ...]
    ap: float | None
    exported_ap: float | None
    fp16: bool
    why_not: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every detection has its counterpart, and AP is the same."""
        differs = self.ap is not None and self.exported_ap is not None
        apart = differs and abs((self.ap or 0) - (self.exported_ap or 0)) > AP_TOLERANCE[self.fp16]
        return not apart and all(row.unmatched == 0 for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"passed": self.passed}

    def table(self) -> Table:
        """For a rich console."""
        caption = (
            f"AP is not compared: {self.why_not}"
            if self.ap is None
            else f"AP {self.ap:.4f}, exported {self.exported_ap or 0:.4f}"
        )
        table = Table(
            title="Exported against the run",
            title_justify="left",
            caption=caption,
            caption_justify="left",
        )
        for name in (
            "batch",
            "pictures",
            "detections",
            "unmatched",
            "largest score difference",
            "in pixels",
        ):
            table.add_column(name, justify="right")
        for r in self.rows:
            numbers = (str(n) for n in (r.batch, r.pictures, r.detections, r.unmatched))
            table.add_row(*numbers, f"{r.score:.1e}", f"{r.pixels:.1e}")
        return table


def check_pictures(
    pictures: str | Path, data: DataConfig, size: tuple[int, int] | None = None
) -> None:
    """Raises `UserError` where `compare_on_pictures` would find none, or one that the recipe's
    `data` do not resize to the one `size` (height, width) of the file; before minutes of tracing.
    """
    stills = [each for each in find_pictures(pictures, recursive=True) if not each.is_video]
    if not stills:
        raise UserError(f"{pictures}: no picture in it", "Name a folder of pictures.")
    resize = eval_transform(data.size, **data.resizing())
    if size is None or (data.keep_aspect and resize.pad_to is not None):  # all become one size
        return
    for still in stills:
        with contextlib.suppress(UserError):  # what cannot be read is left out later
            seen = resize.target(*still.size())
            if seen != size:
                break
    else:
        return
    (height, width), (given, other) = seen, size
    raise UserError(
        f"--size {given}x{other} does not take {still.path}, which becomes {height}x{width} pixels "
        "(height x width)",
        f"Export without --size, for pictures of any size, with --size {height}x{width}, or verify "
        "on other pictures.",
    )


def compare_on_pictures(
    model: Model, exported: Model, pictures: str | Path, *, fp16: bool
) -> tuple[Comparison, ...]:
    """Detections of both in all pictures, in batches of 1, 2 and 5.
    Raises `UserError` where no picture is readable.
    """
    ours = _detections(model, pictures, 1)
    if not ours:
        raise UserError(f"{pictures}: no picture in it can be read", "Name a folder of pictures.")
    rows = []
    for batch in BATCHES:
        theirs = _detections(exported, pictures, batch)
        # Each side's detections against all of the other's: at the border of the score none lacks a
        # counterpart.
        sides = [
            pair
            for one, other in zip(ours, theirs, strict=True)
            for pair in ((one, other), (other, one))
        ]
        differences = np.concatenate([_differences(*pair, TOLERANCE[fp16]) for pair in sides])
        matched = np.isfinite(differences).all(axis=1)
        score, pixels = differences[matched].max(axis=0, initial=0).tolist()
        rows.append(
            Comparison(batch, len(ours), len(differences), int((~matched).sum()), score, pixels)
        )
    return tuple(rows)


def _detections(model: Model, pictures: str | Path, batch: int) -> list[Prediction]:
    stills = (
        picture for picture in find_pictures(pictures, recursive=True) if not picture.is_video
    )
    predictions = model.detect(stills, 0.0, None, batch)
    return [
        prediction for prediction in predictions if not isinstance(prediction, UnreadablePicture)
    ]


def _differences(mine: Prediction, others: Prediction, tolerance: Sequence[float]) -> Array:
    """Of each of `mine` that counts, how far the nearest one of `others` is in score and pixels,
    `(n, 2)`; infinite where none is within the tolerance."""
    (scores, boxes, labels), (their_scores, their_boxes, their_labels) = (
        _arrays(mine),
        _arrays(others),
    )
    counted = scores >= SCORE
    score = np.abs(scores[counted, None] - their_scores)
    pixels = np.abs(boxes[counted, None] - their_boxes).max(axis=-1, initial=0)
    side = max(mine.size)
    apart = np.maximum(score / tolerance[0], pixels / (tolerance[1] * side))
    apart[labels[counted, None] != their_labels] = np.inf
    out = np.full((len(apart), 2), np.inf)
    if apart.shape[1]:
        nearest, rows = apart.argmin(axis=1), np.arange(len(apart))
        near = apart[rows, nearest] <= 1
        out[near, 0], out[near, 1] = score[rows, nearest][near], pixels[rows, nearest][near]
    return out


def _arrays(prediction: Prediction) -> tuple[Array, Array, NDArray[np.int64]]:
    boxes = np.array(prediction.boxes, dtype=np.float64).reshape(-1, 4)
    return (
        np.array(prediction.scores, dtype=np.float64),
        boxes,
        np.array(prediction.labels, dtype=np.int64),
    )
