"""What a detector finds in pictures, and what `predict` leaves on disk."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrellis.data.decode import read_image
from detrellis.data.files import image_suffixes, is_image
from detrellis.data.layout import DataSource
from detrellis.errors import UserError
from detrellis.visualize import draw_detections

if TYPE_CHECKING:
    from PIL.Image import Image

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Prediction:
    """Detections of one picture, with names and the data set's own category ids; best first."""

    path: Path
    size: tuple[int, int]  # height, width
    scores: list[float]
    names: list[str]
    labels: list[int]  # class index 0..C-1
    category_ids: list[int]
    boxes: list[tuple[float, float, float, float]]  # x1, y1, x2, y2 in pixels

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
                "file_name": str(self.path),
            }
            for score, name, category, (x1, y1, x2, y2) in rows
        ]

    def draw(self, class_names: Sequence[str]) -> Image:
        """The picture with boxes, names and scores."""
        from PIL import Image

        picture = Image.fromarray(read_image(self.path).permute(1, 2, 0).numpy())
        return draw_detections(picture, self.boxes, self.labels, self.scores, class_names)


def find_pictures(paths: Paths) -> list[Path]:
    """Image files among `paths`, and those directly in folders among them, sorted by name."""
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if is_image(p))
            if not inside:
                raise UserError(f"{path}: no images in this folder", f"Known: {', '.join(sorted(image_suffixes()))}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder", "Give images or folders of images.")
    return found


def save_predictions(
    found: Iterable[Prediction], out: Path, class_names: Sequence[str], data: Mapping[str, Any] | None
) -> list[Prediction]:
    """Write each prediction's picture as it comes, and all of them as COCO results; returns them as a list.

    A picture that belongs to the data set that the model was trained on (`data`: the `DataSource`, as `to_dict` gives
    it) keeps its image id there; others count on from the highest one.
    """
    out.mkdir(parents=True, exist_ok=True)
    predictions: list[Prediction] = []
    taken: set[str] = set()
    for prediction in found:
        predictions.append(prediction)
        name = prediction.path.stem
        while name in taken:  # the same name in another folder
            name += "_"
        taken.add(name)
        prediction.draw(class_names).save(out / f"{name}.jpg", quality=92)
    rows = [row for p, i in zip(predictions, image_ids(predictions, data), strict=True) for row in p.to_coco(i)]
    (out / "predictions.json").write_text(json.dumps(rows, indent=1))
    return predictions


def image_ids(predictions: Sequence[Prediction], data: Mapping[str, Any] | None) -> list[int]:
    """The data set's own id of each picture, where the data set is still there and holds it."""
    known: dict[Path, int] = {}
    if data is not None:
        with contextlib.suppress(UserError):  # moved or deleted since: then nothing is known
            for raw in DataSource.from_dict(data).load_all().values():
                known |= {raw.path(row).resolve(): int(i) for row, i in enumerate(raw.image_ids)}
    fresh = itertools.count(max(known.values(), default=0) + 1)
    return [known[p.path.resolve()] if p.path.resolve() in known else next(fresh) for p in predictions]
