"""Pictures that went wrong, drawn small enough for a page."""

from __future__ import annotations

import contextlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detrellis.data.annotations import Annotations
from detrellis.data.decode import read_image
from detrellis.errors import UserError
from detrellis.report.diagnose import Diagnosed
from detrellis.report.record import Picture
from detrellis.visualize.detections import draw_detections

PICTURES = 6  # of each kind
SIDE = 400  # pixels of the longer one
QUALITY = 70  # of the JPEG

Float = NDArray[np.float64]


def galleries(diagnosed: Diagnosed, annotations: Annotations) -> dict[str, tuple[Picture, ...]]:
    """The surest false alarms, the pictures with most missed objects,
    and the surest confusions of classes.
    """
    done, names, marks = diagnosed.done, annotations.classes.names, _Marks(annotations, diagnosed)
    # False alarms: of each picture the surest says where it stands.
    alarms: dict[int, list[int]] = defaultdict(list)
    for number in diagnosed.wrong.tolist():
        alarms[int(done.rows[number - 1, 0])].append(number)
    # Misses: the most in one picture first.
    missed: dict[int, list[int]] = defaultdict(list)
    for number in diagnosed.missed.tolist():
        missed[int(done.truth.image[number - 1])].append(number)
    by_misses = sorted(missed, key=lambda image: -len(missed[image]))
    # Confusions: a picture for each.
    mistaken = {error["image_id"]: error for error in reversed(diagnosed.confused)}
    surest = sorted(mistaken.values(), key=lambda error: -error["dt_score"])
    return {
        "False alarms": marks.drawn(
            {image: marks.detections(alarms[image]) for image in list(alarms)}
        ),
        "Misses": marks.drawn({image: marks.boxes(missed[image]) for image in by_misses}),
        "Confusions": marks.drawn(
            {
                e["image_id"]: (
                    *marks.detections([e["dt_id"]])[:3],
                    f"given as {names[e['gt_category_id'] - 1]}",
                )
                for e in surest
            }
        ),
    }


# Boxes xywh, labels, scores, what is wrong
_Drawing = tuple[Float, list[int], list[float] | None, str]


class _Marks:
    """What is drawn on the pictures of an evaluation."""

    def __init__(self, annotations: Annotations, diagnosed: Diagnosed) -> None:
        self.annotations, self.done = annotations, diagnosed.done

    def detections(self, numbers: Iterable[int]) -> _Drawing:
        """Detections, with their scores."""
        rows = np.array([*numbers]) - 1
        labels = self.done.labels[rows].tolist()
        return (
            self.done.rows[rows, 1:5],
            labels,
            self.done.rows[rows, 5].tolist(),
            self._counted(labels),
        )

    def boxes(self, numbers: Iterable[int]) -> _Drawing:
        """Boxes of the data set."""
        rows = np.array([*numbers]) - 1
        labels = (self.done.truth.category[rows] - 1).tolist()
        return self.done.truth.boxes[rows], labels, None, self._counted(labels)

    def drawn(self, drawings: Mapping[int, _Drawing]) -> tuple[Picture, ...]:
        """The first few pictures, without those that cannot be read."""
        pictures: list[Picture] = []
        for image, drawing in drawings.items():
            if len(pictures) == PICTURES:
                break
            with contextlib.suppress(UserError):
                pictures.append(self._picture(int(self.done.order[image - 1]), *drawing))
        return tuple(pictures)

    def _picture(
        self, row: int, boxes: Float, labels: list[int], scores: list[float] | None, what: str
    ) -> Picture:
        path = self.annotations.path(row)
        whole = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
        scale = min(1, SIDE / max(whole.size))
        small = whole.resize(
            (max(1, round(whole.width * scale)), max(1, round(whole.height * scale)))
        )
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) * scale
        names = self.annotations.classes.names
        sheet = draw_detections(small, corners, labels, scores, names, min_side=SIDE, legend=False)
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=QUALITY)
        return Picture(file=str(path), caption=what, jpeg=buffer.getvalue())

    def _counted(self, labels: list[int]) -> str:
        """ "3 cat, 1 dog"."""
        counts = Counter(labels).most_common()
        return ", ".join(
            f"{count} {self.annotations.classes.names[label]}" for label, count in counts
        )
