"""COCO's box statistics, from detections that arrive batch by batch.

Detections are kept as one flat matrix per batch (56 bytes each), never as logits or dicts, and go to the evaluator as
arrays. The evaluator is hotcoco (Rust): about 1 s where pycocotools needs minutes, with the same twelve numbers. Where
hotcoco cannot be imported pycocotools takes its place. No other file knows either of them, but `data/masks.py`, which
draws with hotcoco.

Images, classes and boxes are renumbered 1..n for the evaluator, in the order of the data set's own ids: negative ids,
ids above 2^53 and the annotation id 0 (a ground truth that pycocotools never counts as found) then make no difference.
The order matters, because equal scores are ranked by image.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from detrellis.atomic import replace_files
from detrellis.data.annotations import Annotations
from detrellis.engine.console import number
from detrellis.errors import UserError
from detrellis.types import Detections

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

Float = NDArray[np.float64]
Int = NDArray[np.int64]


class ResultArrays(NamedTuple):
    """What one process has collected, as flat arrays that processes can send to each other."""

    images: Int  # (S,) rows of the `Annotations` that were evaluated, with or without detections
    rows: Float  # (N, 7) image row, x, y, width, height, score, class index
    dropped: Int  # (S,) detections of each image left out because a number in them was not finite


@dataclass(frozen=True)
class ClassResult:
    """COCO's AP of one class. It is None where the class has no ground truth."""

    name: str
    id: int  # the data set's category id
    ap: float | None
    ap50: float | None
    ground_truth: int  # boxes, without crowd regions
    detections: int


@dataclass(frozen=True, kw_only=True)
class EvalScores:
    """What every metric reports: statistics in 0..1, None where one is undefined, and what they were computed from."""

    stats: Mapping[str, float | None]  # by name
    images: int  # that were evaluated
    images_in_set: int
    ground_truth: int  # boxes in the evaluated images that count
    detections: int
    dropped: int = 0  # detections with a number that was not finite

    @property
    def ap(self) -> float | None:
        """The main statistic of the metric."""
        return self.stats["AP"]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        data = asdict(self)
        return data | {"stats": dict(self.stats), "per_class": list(data["per_class"])}

    def caption(self, boxes: str) -> str:
        """What the statistics were computed from, as a table's caption; `boxes` says of how many boxes."""
        part = "" if self.images == self.images_in_set else f" of {self.images_in_set:,}"
        text = f"{self.images:,}{part} images, {boxes}, {self.detections:,} detections"
        return text + (f"; {self.dropped:,} detections were not finite and left out" if self.dropped else "")


@dataclass(frozen=True, kw_only=True)
class EvalResult(EvalScores):
    """The twelve COCO statistics, by the names in `STATISTICS`, and each class's AP; crowd regions do not count.

    `ap` is over IoU 0.50:0.95. None where COCO has -1.
    """

    per_class: tuple[ClassResult, ...]  # in the order of class indices

    @property
    def ap50(self) -> float | None:
        """AP at IoU 0.50; None where it is undefined."""
        return self.stats["AP50"]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalResult:
        """The inverse of `to_dict`."""
        return cls(**dict(data) | {"per_class": tuple(ClassResult(**c) for c in data["per_class"])})

    def table(self) -> Table:
        """A table of the twelve statistics for a rich console."""
        from rich.table import Table
        from rich.text import Text

        caption = self.caption(f"{self.ground_truth:,} boxes")
        table = Table(title="COCO box AP and AR", caption=caption, caption_justify="left", title_justify="left")
        for name in STATISTICS[:6]:
            table.add_column(name, justify="right")
        values = [number(self.stats[name]) for name in STATISTICS]
        table.add_row(*values[:6], end_section=True)
        table.add_row(*(Text(name, "bold") for name in STATISTICS[6:]))
        table.add_row(*values[6:])
        return table

    def class_table(self) -> Table:
        """A table with one row per class for a rich console."""
        from rich.table import Table
        from rich.text import Text

        table = Table("class", title="AP by class", title_justify="left")
        for name in ("AP", "AP50", "boxes", "detections"):
            table.add_column(name, justify="right")
        for c in self.per_class:  # Text: a class may be called "[bold]"
            table.add_row(Text(c.name), number(c.ap), number(c.ap50), str(c.ground_truth), str(c.detections))
        return table


class CocoEvaluator:
    """Collects detections and computes COCO's statistics over the images that it was shown.

    `top_k` is how many detections of an image are kept, the best ones. COCO itself looks at the best 100 of each class.
    """

    def __init__(self, annotations: Annotations, top_k: int = 300) -> None:
        self.annotations, self.top_k = annotations, top_k
        self._order = np.argsort(annotations.image_ids, kind="stable")
        self._seen = np.zeros(len(annotations), dtype=np.bool_)
        self._chunks: list[Float] = []
        self._dropped = np.zeros(len(annotations), dtype=np.int64)

    def update(self, image_ids: Sequence[int], detections: Sequence[Detections]) -> None:
        """Adds a batch: the data set's image ids and each image's detections, in pixels of the original image.

        An image that was added before is passed over: distributed samplers repeat some to fill the last batch.
        Raises UserError for an image or a class that the annotations do not hold.
        """
        assert len(image_ids) == len(detections), f"{len(image_ids)} image ids for {len(detections)} images"
        if not detections:
            return
        images, matrix = self._rows_of(image_ids), _to_host(detections)
        self._check_labels(matrix[:, 5])
        splits = np.cumsum([len(d.scores) for d in detections])[:-1]
        for image, part in zip(images, np.split(matrix, splits), strict=True):
            if not self._seen[image]:
                self._seen[image] = True
                self._add(int(image), part)

    def arrays(self) -> ResultArrays:
        """Everything collected so far, to be sent to the process that computes."""
        rows = np.concatenate(self._chunks) if self._chunks else np.zeros((0, 7))
        images = np.flatnonzero(self._seen).astype(np.int64)
        return ResultArrays(images, rows, self._dropped[images])

    def merge(self, *others: ResultArrays) -> None:
        """Adds what other processes collected over the same annotations; an image that is here already stays as is."""
        for other in others:
            fresh = ~self._seen[other.images]
            owner = other.rows[:, 0].astype(np.int64)
            self._chunks.append(other.rows[~self._seen[owner]])
            self._dropped[other.images[fresh]] = other.dropped[fresh]
            self._seen[other.images[fresh]] = True

    def compute(self) -> EvalResult:
        """The statistics over the images shown so far.

        An image shown without detections counts (its boxes were missed); an image never shown does not.
        """
        a, (_, rows, dropped) = self.annotations, self.arrays()
        # Images and classes are numbered from 1 for the evaluator: see the top of the file.
        rank = np.empty(len(a), dtype=np.int64)
        rank[self._order] = np.arange(1, len(a) + 1)
        image = a.box_rows
        shown = self._seen[image]
        image, labels, crowd = image[shown], a.labels[shown], a.crowd[shown]
        detected = rows[:, 6].astype(np.int64)
        rows[:, 0] = rank[rows[:, 0].astype(np.int64)]
        rows[:, 6] += 1
        truth = _Truth(
            images=np.sort(rank[self._seen]),
            classes=len(a.classes),
            image=rank[image],
            category=labels + 1,
            boxes=a.boxes[shown],
            areas=a.areas[shown],
            crowd=crowd,
        )
        stats, precision = _backend()(truth, rows)
        return EvalResult(
            stats={name: _defined(value) for name, value in zip(STATISTICS, stats, strict=True)},
            per_class=self._per_class(precision, labels[~crowd], detected),
            images=int(self._seen.sum()),
            images_in_set=len(a),
            ground_truth=int((~crowd).sum()),
            detections=len(rows),
            dropped=int(dropped.sum()),
        )

    def results_json(self, path: str | Path) -> None:
        """Writes the detections in COCO's results format, with the data set's own image and category ids.

        Every digit is written, so evaluating the file gives the statistics of `compute`.
        """

        def write(partial: Path) -> None:
            with partial.open("w", encoding="utf-8") as file:
                file.write("[")
                self._write_rows(file)
                file.write("]\n")

        replace_files((Path(path), write))

    def _write_rows(self, file: TextIO) -> None:
        image_ids, category_ids = self.annotations.image_ids.tolist(), self.annotations.classes.ids
        separator = "\n"
        for chunk in self._chunks:
            if not len(chunk):
                continue
            lines = (
                f'{{"image_id": {image_ids[int(i)]}, "category_id": {category_ids[int(c)]}, '
                f'"bbox": [{x}, {y}, {w}, {h}], "score": {score}}}'
                for i, x, y, w, h, score, c in chunk.tolist()
            )
            file.write(separator + ",\n".join(lines))
            separator = ",\n"

    def _rows_of(self, image_ids: Sequence[int]) -> Int:
        wanted, known = np.asarray(image_ids, dtype=np.int64), self.annotations.image_ids
        if not len(known):
            raise UserError(f"image id {wanted[0]} is not in the annotations: they hold no image")
        place = np.searchsorted(known, wanted, sorter=self._order).clip(max=len(known) - 1)
        rows: Int = self._order[place]
        if (wrong := known[rows] != wanted).any():
            message = f"image id {wanted[wrong][0]} is not in the annotations"
            raise UserError(message, "Evaluate with the annotation file that the images were loaded with.")
        return rows

    def _check_labels(self, labels: Float) -> None:
        count = len(self.annotations.classes)
        if len(labels) and not (labels.min() >= 0 and labels.max() < count):
            wrong = labels[(labels < 0) | (labels >= count)][0]
            message = f"a detection has class index {wrong:.0f}, but the data set has {count} classes (0..{count - 1})"
            raise UserError(message, "Evaluate on a data set with the classes that the model was trained on.")

    def _add(self, image: int, part: Float) -> None:
        finite = np.isfinite(part).all(axis=1)
        self._dropped[image] = (~finite).sum()
        part = part[finite]
        if len(part) > self.top_k:
            part = part[np.argsort(-part[:, 4], kind="stable")[: self.top_k]]
        self._chunks.append(np.column_stack([np.full(len(part), image), part]))

    def _per_class(self, precision: Float, truth: Int, detected: Int) -> tuple[ClassResult, ...]:
        classes = self.annotations.classes
        boxes, detections = (np.bincount(x, minlength=len(classes)) for x in (truth, detected))
        results = []
        for k, (name, category) in enumerate(zip(classes.names, classes.ids, strict=True)):
            # COCO leaves every entry of a class without ground truth at -1, and no entry of any other class.
            ap, ap50 = (_defined(float(p.mean())) for p in (precision[:, :, k], precision[0, :, k]))
            results.append(ClassResult(name, category, ap, ap50, int(boxes[k]), int(detections[k])))
        return tuple(results)


class _Truth(NamedTuple):
    """Ground truth as the evaluators take it; images and classes are numbered from 1."""

    images: Int  # (S,)
    classes: int
    image: Int  # (T,)
    category: Int  # (T,)
    boxes: Float  # (T, 4) x, y, width, height
    areas: Float  # (T,)
    crowd: NDArray[np.bool_]  # (T,)


Evaluator = Callable[[_Truth, Float], tuple[Float, Float]]


def _to_host(detections: Sequence[Detections]) -> Float:
    """The rows `(N, 6)` x, y, width, height, score, class index, with one copy from the device for the whole batch."""
    boxes, scores, labels = (
        torch.cat(parts).detach() for parts in zip(*((d.boxes, d.scores, d.labels) for d in detections), strict=True)
    )
    # float32 holds every class index, and not every accelerator has float64; a double input stays what it is.
    dtype = torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32
    packed = torch.cat([boxes.to(dtype), scores.to(dtype)[:, None], labels.to(dtype)[:, None]], dim=1)
    matrix: Float = packed.cpu().numpy().astype(np.float64)
    matrix[:, 2:4] -= matrix[:, :2]
    return matrix


def _defined(value: float) -> float | None:
    return None if value < 0 else float(value)


@functools.cache
def _backend() -> Evaluator:
    """The evaluator that can be imported; the slow one is announced once."""
    try:
        from hotcoco import COCO

        _ = COCO.from_arrays  # releases before 1.3 lack it
        return _hotcoco
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error)
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        remedy = "Install it with `pip install -U hotcoco` (or, slower, `pip install pycocotools`)."
        raise UserError(f"COCO evaluation needs hotcoco, which cannot be imported: {reason}", remedy) from None
    logger.warning(
        "hotcoco cannot be imported (%s): evaluating with pycocotools, which is about 100 times slower", reason
    )
    return _pycocotools


def _hotcoco(truth: _Truth, rows: Float) -> tuple[Float, Float]:
    """Statistics (12,), and precision (IoU, recall, class) over all areas with 100 detections, from hotcoco."""
    from hotcoco import COCO, COCOeval

    t = truth
    images, categories = _numbered(t)
    ids = np.arange(1, len(t.image) + 1)
    gt = COCO.from_arrays(images, categories, t.image, t.category, t.boxes, ids=ids, area=t.areas, iscrowd=t.crowd)
    evaluation = COCOeval(gt, gt.load_res(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # fills `stats` without printing
    assert evaluation.eval is not None
    return np.asarray(evaluation.stats), evaluation.eval["precision"][..., 0, -1]


def _pycocotools(truth: _Truth, rows: Float) -> tuple[Float, Float]:
    """The same statistics and precision from pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    t, f = truth, rows
    images, categories = _numbered(t)
    # Not through loadRes: it fails when there is no detection at all.
    gt_columns = (t.image, t.category, t.boxes, t.areas, t.crowd, np.zeros(len(t.image)))
    dt_columns = (f[:, 0], f[:, 6], f[:, 1:5], f[:, 3] * f[:, 4], np.zeros(len(f), dtype=np.bool_), f[:, 5])
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for columns in (gt_columns, dt_columns):
            side = COCO()
            side.dataset = {"images": images, "categories": categories, "annotations": _dicts(*columns)}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats), evaluation.eval["precision"][..., 0, -1]


def _numbered(truth: _Truth) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    images = [{"id": i, "width": 0, "height": 0} for i in truth.images.tolist()]
    return images, [{"id": k + 1, "name": str(k)} for k in range(truth.classes)]


def _dicts(image: Any, category: Any, boxes: Float, areas: Float, crowd: Any, scores: Float) -> list[dict[str, Any]]:
    names = ("image_id", "category_id", "bbox", "area", "iscrowd", "score")
    columns = (image.astype(int), category.astype(int), boxes, areas, crowd.astype(int), scores)
    rows = zip(*(c.tolist() for c in columns), strict=True)
    return [dict(zip(names, row, strict=True)) | {"id": n} for n, row in enumerate(rows, start=1)]
