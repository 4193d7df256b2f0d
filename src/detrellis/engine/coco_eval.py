"""COCO's box statistics, from detections that arrive batch by batch.

Detections are kept as one flat matrix per batch (56 bytes each), never as logits or dicts, and go
to the evaluator (`coco_backend.py`) as arrays.

Images, classes and boxes are renumbered 1..n for the evaluator, in the order of the data set's own
ids: negative ids, ids above 2^53 and the annotation id 0 (a ground truth that pycocotools never
counts as found) then make no difference. The order matters, because equal scores are ranked by
image.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch

from detrellis.atomic import replace_files
from detrellis.data.annotations import Annotations
from detrellis.data.masks import run_lengths
from detrellis.engine.bootstrap import MAX_IMAGES, half_interval, resampled_ap
from detrellis.engine.coco_backend import Float, Int, Masks, Truth, backend
from detrellis.engine.eval_result import COUNTED, STATISTICS, ClassResult, EvalResult, Kind
from detrellis.engine.lvis_eval import LIMITS, NAMES, class_lists, lvis_scores
from detrellis.errors import UserError
from detrellis.types import Detections


class ResultArrays(NamedTuple):
    """What one process has collected, as flat arrays that processes can send to each other."""

    images: Int  # (S,) rows of the `Annotations` that were evaluated, with or without detections
    rows: Float  # (N, 7) image row, x, y, width, height, score, class index
    dropped: Int  # (S,) detections of each image left out because a number in them was not finite
    masks: tuple[bytes, ...] | None = None  # (N,) run lengths, of detectors that give masks


class Evaluated(NamedTuple):
    """An evaluation, with what it was given;
    images and classes are numbered from 1, detections and boxes too.
    """

    truth: Truth
    rows: Float  # (N, 7) image, x, y, width, height, score, class of detection 1, 2, ...
    stats: Float  # (12,)
    precision: Float  # (IoU, recall, class)
    evaluation: Any  # hotcoco's or pycocotools' `COCOeval`
    order: Int  # row in the annotations of image 1, 2, ...
    shown: Int  # place in the annotations of box 1, 2, ...

    @property
    def labels(self) -> Int:
        """The class index of each detection `(N,)`, from 0."""
        return self.rows[:, 6].astype(np.int64) - 1


class CocoEvaluator:
    """Collects detections and computes COCO's statistics over the images that it was shown.

    `top_k` is how many detections of an image are kept, the best ones. COCO looks at the best
    `COUNTED` of a class. `truth` are the masks of the annotations (`run_lengths`), for many
    evaluations; without them one reads the files.
    """

    def __init__(
        self, annotations: Annotations, top_k: int = 300, truth: Masks | None = None
    ) -> None:
        self.annotations, self.top_k, self.truth = annotations, top_k, truth
        self._order = np.argsort(annotations.image_ids, kind="stable")
        self._seen = np.zeros(len(annotations), dtype=np.bool_)
        self._chunks: list[Float] = []
        self._masks: list[bytes] = []  # of all rows of the chunks, where the detector gives masks
        self._masked = False
        self._dropped = np.zeros(len(annotations), dtype=np.int64)

    def update(self, image_ids: Sequence[int], detections: Sequence[Detections]) -> None:
        """Adds a batch: the data set's image ids and each image's detections,
        in pixels of the original image.

        An image that was added before is passed over: distributed samplers repeat some to fill the
        last batch. Raises UserError for an image or a class that the annotations do not hold.
        """
        assert len(image_ids) == len(detections), (
            f"{len(image_ids)} image ids for {len(detections)} images"
        )
        if not detections:
            return
        images, matrix = self._rows_of(image_ids), _to_host(detections)
        self._check_labels(matrix[:, 5])
        self._masked |= detections[0].masks is not None
        splits = np.cumsum([len(d.scores) for d in detections])[:-1]
        for image, part, detected in zip(images, np.split(matrix, splits), detections, strict=True):
            if not self._seen[image]:
                self._seen[image] = True
                kept = self._add(int(image), part)
                self._masks += (
                    [] if detected.masks is None else [detected.masks[row] for row in kept.tolist()]
                )

    def arrays(self) -> ResultArrays:
        """Everything collected so far, to be sent to the process that computes."""
        rows = np.concatenate(self._chunks) if self._chunks else np.zeros((0, 7))
        images = np.flatnonzero(self._seen).astype(np.int64)
        return ResultArrays(
            images, rows, self._dropped[images], tuple(self._masks) if self._masked else None
        )

    def merge(self, *others: ResultArrays) -> None:
        """Adds what other processes collected over the same annotations;
        an image that is here already stays as is.
        """
        for other in others:
            fresh = ~self._seen[other.images]
            kept = ~self._seen[other.rows[:, 0].astype(np.int64)]
            self._chunks.append(other.rows[kept])
            if other.masks is not None:
                self._masked = True
                self._masks += itertools.compress(other.masks, kept.tolist())
            self._dropped[other.images[fresh]] = other.dropped[fresh]
            self._seen[other.images[fresh]] = True

    @property
    def kind(self) -> Kind:
        """What the detector is judged by:
        its masks, where it gives them and the data set has them.
        """
        return "mask" if self._masked and self.annotations.segmentations is not None else "box"

    def compute(self, *, resample: bool = False, of: Kind = "box") -> EvalResult:
        """The statistics over the images shown so far;
        `resample` says how far so many images let AP be known.

        An image shown without detections counts (its boxes were missed); an image never shown does
        not. Raises `UserError` where masks are asked for and the data set has not one for each
        object.
        """
        a, frequencies, beyond = self.annotations, None, 0
        if a.federation is not None:
            truth, rows, drawn, _ = self._given(of)
            seen = a.image_ids[self._order][self._seen[self._order]]
            truth = truth._replace(lists=class_lists(a.federation, seen, a.classes.ids))
            lvis, precision = lvis_scores(truth, rows, drawn, LIMITS[0])
            more = (
                lvis if self.top_k <= LIMITS[0] else lvis_scores(truth, rows, drawn, LIMITS[1])[0]
            )
            values = {name: lvis.get(name, -1.0) for name in NAMES} | {
                "AP@1000": more.get("AP", -1.0)
            }
            frequencies = {name: _defined(value) for name, value in values.items()}
            stats, resample = np.array([lvis.get(name, -1.0) for name in STATISTICS]), False
        else:
            truth, rows, stats, precision, evaluation, *_ = self.evaluated(of)
            beyond = _beyond(truth)
        resampled = None
        if resample and 0 < len(truth.images) <= MAX_IMAGES:
            every = list(evaluation.params.areaRng[0])
            matches = [
                match
                for match in evaluation.evalImgs
                if match is not None and list(match["aRng"]) == every
            ]
            resampled = resampled_ap(matches, truth.images.tolist())
        return EvalResult(
            stats={name: _defined(value) for name, value in zip(STATISTICS, stats, strict=True)},
            per_class=self._per_class(
                precision, truth.category[~truth.crowd] - 1, rows[:, 6].astype(np.int64) - 1
            ),
            images=int(self._seen.sum()),
            images_in_set=len(a),
            ground_truth=int((~truth.crowd).sum()),
            detections=len(rows),
            dropped=int(self._dropped.sum()),
            ap_interval=None if resampled is None else half_interval(resampled),
            resampled=resampled,
            of=of,
            frequencies=frequencies,
            beyond=beyond,
        )

    def evaluated(self, of: Kind = "box") -> Evaluated:
        """COCO's evaluation over the images shown so far, with what it was given.
        Raises as `compute`.
        """
        truth, rows, drawn, shown = self._given(of)
        return Evaluated(truth, rows, *backend()(truth, rows, drawn), self._order, shown)

    def _given(self, of: Kind) -> tuple[Truth, Float, Masks | None, Int]:
        """Ground truth, detections and their masks as evaluators take them;
        and which annotations are the truth's.
        """
        a, (_, rows, _, runs) = self.annotations, self.arrays()
        drawn = masks = None
        if of == "mask":
            assert runs is not None, "the detector gives no masks"
            owners = a.sizes[rows[:, 0].astype(np.int64)].tolist()
            drawn = [{"size": size, "counts": run} for size, run in zip(owners, runs, strict=True)]
            masks = run_lengths(a) if self.truth is None else self.truth
        # Images and classes are numbered from 1 for the evaluator: see the top of the file.
        rank = np.empty(len(a), dtype=np.int64)
        rank[self._order] = np.arange(1, len(a) + 1)
        image = a.box_rows
        shown = self._seen[image]
        rows[:, 0] = rank[rows[:, 0].astype(np.int64)]
        rows[:, 6] += 1
        truth = Truth(
            images=np.sort(rank[self._seen]),
            classes=len(a.classes),
            image=rank[image[shown]],
            category=a.labels[shown] + 1,
            boxes=a.boxes[shown],
            areas=a.areas[shown],
            crowd=a.crowd[shown],
            masks=None if masks is None else list(itertools.compress(masks, shown.tolist())),
        )
        return truth, rows, drawn, np.flatnonzero(shown)

    def results_json(self, path: str | Path) -> None:
        """Writes the detections in COCO's results format,
        with the data set's own image and category ids.

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
        masks = iter(self._masks)
        separator = "\n"
        for chunk in self._chunks:
            if not len(chunk):
                continue
            lines = (
                f'{{"image_id": {image_ids[int(i)]}, "category_id": {category_ids[int(c)]}, '
                f'"bbox": [{x}, {y}, {w}, {h}], "score": {score}{self._segmentation(int(i), masks)}}}'
                for i, x, y, w, h, score, c in chunk.tolist()
            )
            file.write(separator + ",\n".join(lines))
            separator = ",\n"

    def _segmentation(self, image: int, masks: Iterator[bytes]) -> str:
        if not self._masked:
            return ""
        value = {"size": self.annotations.sizes[image].tolist(), "counts": next(masks).decode()}
        return f', "segmentation": {json.dumps(value)}'

    def _rows_of(self, image_ids: Sequence[int]) -> Int:
        wanted, known = np.asarray(image_ids, dtype=np.int64), self.annotations.image_ids
        if not len(known):
            raise UserError(f"image id {wanted[0]} is not in the annotations: they hold no image")
        place = np.searchsorted(known, wanted, sorter=self._order).clip(max=len(known) - 1)
        rows: Int = self._order[place]
        if (wrong := known[rows] != wanted).any():
            message = f"image id {wanted[wrong][0]} is not in the annotations"
            raise UserError(
                message, "Evaluate with the annotation file that the images were loaded with."
            )
        return rows

    def _check_labels(self, labels: Float) -> None:
        count = len(self.annotations.classes)
        if len(labels) and not (labels.min() >= 0 and labels.max() < count):
            wrong = labels[(labels < 0) | (labels >= count)][0]
            message = (
                f"a detection has class index {wrong:.0f}, but the data set has {count} classes "
                f"(0..{count - 1})"
            )
            raise UserError(
                message, "Evaluate on a data set with the classes that the model was trained on."
            )

    def _add(self, image: int, part: Float) -> Int:
        """Adds the detections of an image; the rows of `part` that are kept."""
        kept = np.flatnonzero(np.isfinite(part).all(axis=1))
        self._dropped[image] = len(part) - len(kept)
        if len(kept) > self.top_k:
            kept = kept[np.argsort(-part[kept, 4], kind="stable")[: self.top_k]]
        self._chunks.append(np.column_stack([np.full(len(kept), image), part[kept]]))
        return kept

    def _per_class(self, precision: Float, truth: Int, detected: Int) -> tuple[ClassResult, ...]:
        classes = self.annotations.classes
        boxes, detections = (np.bincount(x, minlength=len(classes)) for x in (truth, detected))
        results = []
        for k, (name, category) in enumerate(zip(classes.names, classes.ids, strict=True)):
            # COCO leaves every entry of a class without ground truth at -1, and no entry of any
            # other class.
            ap, ap50 = (_defined(float(p.mean())) for p in (precision[:, :, k], precision[0, :, k]))
            results.append(ClassResult(name, category, ap, ap50, int(boxes[k]), int(detections[k])))
        return tuple(results)


def _beyond(truth: Truth) -> int:
    """The boxes beyond the `COUNTED` of each class in each image that as many detections can
    find.
    """
    pairs = (truth.image * (truth.classes + 1) + truth.category)[~truth.crowd]
    _, boxes = np.unique(pairs, return_counts=True)
    return int((boxes - COUNTED).clip(min=0).sum())


def _to_host(detections: Sequence[Detections]) -> Float:
    """The rows `(N, 6)` x, y, width, height, score, class index,
    with one copy from the device for the whole batch.
    """
    boxes, scores, labels = (
        torch.cat(parts).detach()
        for parts in zip(*((d.boxes, d.scores, d.labels) for d in detections), strict=True)
    )
    # float32 holds every class index, and not every accelerator has float64; a double input stays
    # what it is.
    dtype = torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32
    packed = torch.cat(
        [boxes.to(dtype), scores.to(dtype)[:, None], labels.to(dtype)[:, None]], dim=1
    )
    matrix: Float = packed.cpu().numpy().astype(np.float64)
    matrix[:, 2:4] -= matrix[:, :2]
    return matrix


def _defined(value: float) -> float | None:
    return None if value < 0 else float(value)
