"""`RawDataset`: one split as its files have it, good or bad;
and the way from there to `Annotations`.

The readers (`formats/`) fill it, the doctor checks it, `drop_bad` cleans it, `to_annotations` is
the way to training. Columns are numpy arrays, so that a check of 860,000 boxes is a few array
operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrellis.data.annotations import Annotations, Federation, SegmentationReader
from detrellis.data.classes import ClassMap
from detrellis.data.findings import Finding
from detrellis.errors import UserError

SEE_CHECK = "Run `detrellis check` for the full list; `train --skip-bad` leaves such records out."


@dataclass(frozen=True)
class RawDataset:
    """`I` images and `T` boxes in the order of the files.
    Only types and lengths of the columns are guaranteed.
    """

    split: str  # "train", "val" or "test"
    source: Path  # the annotation file, or the folder of label files
    root: Path  # folder that `file_names` are relative to
    categories: tuple[tuple[int, str], ...]  # (id, name) as listed
    image_ids: NDArray[np.int64]  # (I,)
    file_names: tuple[str, ...]  # (I,)
    # (I, 2) height, width; 0 where neither the annotations nor the file tell
    sizes: NDArray[np.int64]
    ids: NDArray[np.int64]  # (T,) annotation ids
    box_image_ids: NDArray[np.int64]  # (T,)
    box_categories: NDArray[np.int64]  # (T,) category ids
    # (T, 4) x, y, width, height in pixels; NaN where there are no four numbers
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]  # (T,) NaN where missing
    crowd: NDArray[np.bool_]  # (T,)
    # (T,) line (YOLO) or number of the object (VOC), from 1; COCO: place in `annotations`
    lines: NDArray[np.int64]
    label_files: tuple[str, ...] | None = None  # (I,) of YOLO and VOC; None: all stands in `source`
    findings: tuple[Finding, ...] = ()  # problems that the reader met and the columns cannot hold
    # (T,) VOC: hard to recognise; None: the format does not tell
    difficult: NDArray[np.bool_] | None = None
    # Box -> what stands where its four numbers should
    written: Mapping[int, str] = field(default_factory=dict)
    # What reads the objects' outlines; None: there are boxes only
    segmentations: SegmentationReader | None = None
    federation: Federation | None = None  # of LVIS; None: every class is looked for in every image

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def box_rows(self) -> NDArray[np.int64]:
        """`(T,)` index of the image that owns each box: the first one with its id, or -1."""
        if not len(self):
            return np.full(len(self.ids), -1, dtype=np.int64)
        known, first = np.unique(self.image_ids, return_index=True)
        place = np.searchsorted(known, self.box_image_ids).clip(max=len(known) - 1)
        return np.where(known[place] == self.box_image_ids, first[place], -1).astype(np.int64)

    @cached_property
    def classes(self) -> ClassMap:
        """The map of the listed categories. Raises `UserError` where an id is listed twice."""
        try:
            return ClassMap.from_categories({"id": i, "name": n} for i, n in self.categories)
        except UserError as error:
            raise UserError(f"{self.source}: {error.message}", error.remedy) from error

    def path(self, row: int) -> Path:
        """Image file of image `row`."""
        return self.root / self.file_names[row]

    def place(self, box: int) -> tuple[str, int | None]:
        """The file in which box `box` is written, and its line there;
        None where lines are not counted.
        """
        row = self.box_rows[box]
        if self.label_files is None or row < 0:
            return str(self.source), None
        return self.label_files[row], int(self.lines[box])

    def image_id(self, row: int) -> int | None:
        """The id of image `row` in the user's files; None where only we count them (YOLO, VOC)."""
        return int(self.image_ids[row]) if self.label_files is None else None

    def box_id(self, box: int) -> int | None:
        """The id of annotation `box` in the user's files; None where they have none."""
        return int(self.ids[box]) if self.label_files is None else None

    def part(self, images: NDArray[np.bool_], *, others: bool) -> RawDataset:
        """The split with only the images where the mask `images (I,)` is True,
        and all that is wrong with them. `others`: and what belongs to no image.
        """
        boxes = np.append(images, others)[self.box_rows]
        places = {
            "image": np.where(images, np.cumsum(images) - 1, -1),
            "annotation": np.where(boxes, np.cumsum(boxes) - 1, -1),
        }
        part = self.take(images, boxes)
        written = {
            int(places["annotation"][box]): text for box, text in self.written.items() if boxes[box]
        }
        findings = []
        for f in self.findings:
            if f.row is None or f.noun not in places:
                findings += [f] * others
            elif (row := int(places[f.noun][f.row])) >= 0:
                findings.append(replace(f, row=row))
        return replace(part, written=written, findings=tuple(findings))

    def take(self, images: NDArray[np.bool_], boxes: NDArray[np.bool_]) -> RawDataset:
        """The split with only the images and boxes where the masks `images (I,)` and `boxes (T,)`
        are True.
        """
        kept = np.flatnonzero(images).tolist()
        label_files = None if self.label_files is None else tuple(self.label_files[i] for i in kept)
        return replace(
            self,
            image_ids=self.image_ids[images],
            file_names=tuple(self.file_names[i] for i in kept),
            sizes=self.sizes[images],
            label_files=label_files,
            difficult=None if self.difficult is None else self.difficult[boxes],
            written={},
            **{name: getattr(self, name)[boxes] for name in BOX_COLUMNS},
        )


HUGE = 1e15  # no pixel of any picture: sums and products of such numbers would overflow

BOX_COLUMNS = ("ids", "box_image_ids", "box_categories", "boxes", "areas", "crowd", "lines")


def believed(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(T, 4)` boxes with NaN for numbers that no picture can have."""
    return np.where(np.abs(boxes) < HUGE, boxes, np.nan)


def clip(boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """`(T, 4)` xywh boxes cut to their frames `(T, 2)` (height, width).
    A box outside gets no width or no height.
    """
    frame = sizes[:, ::-1]  # (T, 2) width, height
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    low_in, high_in = np.clip(low, 0, frame), np.clip(high, 0, frame)
    clipped = np.concatenate([low_in, high_in - low_in], axis=1)
    # A box inside keeps its numbers to the last bit: (x + w) - x need not be w.
    cut = ((low_in != low) | (high_in < high)).any(axis=1)
    return np.where(cut[:, None], clipped, boxes)


def to_annotations(raw: RawDataset, classes: ClassMap | None = None) -> Annotations:
    """The flat arrays that training reads:
    boxes grouped by image, clipped to the frame, labels from `classes`.

    `classes` is the training set's map (default: the one of `raw`). A record that cannot be used
    raises `UserError` naming the first one: the doctor lists them all, and `drop_bad` leaves them
    out.
    """
    classes = raw.classes if classes is None else classes
    labels = classes.indices(raw.box_categories)
    _refuse_bad(raw, labels)
    # Boxes in the order of their images.
    order = np.argsort(raw.box_rows, kind="stable")
    counts = np.bincount(raw.box_rows, minlength=len(raw))
    boxes = clip(raw.boxes, raw.sizes[raw.box_rows])[order]
    areas = raw.areas[order]
    names = [name.encode() for name in raw.file_names]
    return Annotations(
        root=raw.root,
        classes=classes,
        image_ids=raw.image_ids,
        file_names=np.array(names, dtype=np.bytes_) if names else np.zeros(0, dtype="S1"),
        sizes=raw.sizes,
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes,
        labels=labels[order],
        crowd=raw.crowd[order],
        areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
        ids=raw.ids[order],
        source=raw.source,
        lines=raw.lines[order],
        segmentations=raw.segmentations,
        difficult=None if raw.difficult is None else raw.difficult[order],
        federation=raw.federation,
    )


def _refuse_bad(raw: RawDataset, labels: NDArray[np.int64]) -> None:
    if len(np.unique(raw.image_ids)) != len(raw):
        raise UserError(f"{raw.source}: an image id is used more than once", SEE_CHECK)
    if (raw.sizes <= 0).any():
        row = int(np.flatnonzero((raw.sizes <= 0).any(axis=1))[0])
        raise UserError(f"{raw.path(row)}: height and width are unknown", SEE_CHECK)
    frames = raw.sizes[raw.box_rows] if len(raw) else np.zeros((len(raw.ids), 2), dtype=np.int64)
    reasons = (
        ("belongs to no listed image", raw.box_rows < 0),
        ("has a category that the training set does not list", labels < 0),
        ("has no four finite numbers for a box", ~np.isfinite(raw.boxes).all(axis=1)),
        ("has a box without width or height", (raw.boxes[:, 2:] <= 0).any(axis=1)),
        (
            "has a box outside its image",
            (clip(np.nan_to_num(raw.boxes), frames)[:, 2:] <= 0).any(axis=1),
        ),
    )
    for reason, bad in reasons:
        if bad.any():
            box = int(np.flatnonzero(bad)[0])
            file, line = raw.place(box)
            where = f"line {line}" if line is not None else f"annotation {raw.ids[box]}"
            raise UserError(f"{file}: {where} {reason} ({int(bad.sum())} such)", SEE_CHECK)


def from_columns(
    head: Mapping[str, Any],
    images: Sequence[tuple[str, int, int]],
    rows: Iterable[tuple[int, int, int, Any]],
) -> RawDataset:
    """For sets of one label file per image: ids are given here, from 1, in the order of the files.

    `images` holds (file name, height, width), `rows` (image row, line, category id, xywh in
    pixels), and `head` the fields that these do not make.
    """
    image_rows, lines, categories, boxes = [list(c) for c in zip(*rows, strict=True)] or [
        [],
        [],
        [],
        [],
    ]
    count = len(boxes)
    return RawDataset(
        image_ids=np.arange(1, len(images) + 1, dtype=np.int64),
        file_names=tuple(name for name, _, _ in images),
        sizes=np.array([size for _, *size in images], dtype=np.int64).reshape(-1, 2),
        ids=np.arange(1, count + 1, dtype=np.int64),
        box_image_ids=np.array(image_rows, dtype=np.int64) + 1,
        box_categories=np.array(categories, dtype=np.int64),
        boxes=believed(np.array(boxes, dtype=np.float64).reshape(-1, 4)),
        areas=np.full(count, np.nan),
        crowd=np.zeros(count, dtype=np.bool_),
        lines=np.array(lines, dtype=np.int64),
        **head,
    )
