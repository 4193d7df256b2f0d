"""Sets that give their classes by name, a list of objects a picture:
Pascal VOC, labelme, VIA and CSV.

The readers make an `AnnotatedImage` of each picture, and `datasets` makes columns of them. Class
names in alphabetical order get the ids 1, 2, ...; names that only other splits have follow those of
training. Objects that are drawn as other shapes get the box `around` them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detrellis.data.decode import absence
from detrellis.data.files import read_sizes, stem_below
from detrellis.data.findings import Finding, finding
from detrellis.data.formats.lookup import renaming_notes
from detrellis.data.formats.pictures import PictureName, pictures_of
from detrellis.data.records import RawDataset, from_columns
from detrellis.data.splits import SplitFiles, deciding_splits

# X, y, width, height in pixels; NaN where a number is missing
Box = tuple[float, float, float, float]
Polygons = Sequence[Sequence[float]]  # x1, y1, x2, y2, ... of each
Outline = Polygons | Mapping[str, Any]  # run lengths, as COCO has them
ROUND = 64  # corners of a circle's polygon


class AnnotatedObject(NamedTuple):
    """One object of a picture."""

    name: str  # of its class
    box: Box
    line: int  # its number in the file, or its line, from 1
    difficult: bool = False
    written: str = ""  # what stands where there are no four numbers
    outline: Outline = ()  # of its parts; none where it is drawn as a box


class AnnotatedImage(NamedTuple):
    """One picture with its objects."""

    file: Path  # that lists the objects
    image: str  # the picture's file, relative to the root
    size: tuple[int, int]  # height, width; 0 where the annotations do not say
    objects: Sequence[AnnotatedObject]
    problem: str = ""  # why it is unknown what the picture shows; then there are no objects
    line: int | None = None  # where the problem is


class SplitAnnotations(NamedTuple):
    """What a reader makes of the files of one split."""

    images: list[AnnotatedImage]
    findings: list[Finding]  # what the images cannot hold

    def with_findings(self, findings: Iterable[Finding]) -> SplitAnnotations:
        """The same images with further findings."""
        return SplitAnnotations(self.images, [*self.findings, *findings])


def with_training(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> list[str]:
    """The splits to read for the wanted ones:
    always those that say which name has which id.
    """
    return [
        split for split in dict.fromkeys([*deciding_splits(splits), *wanted]) if split in splits
    ]


def with_pictures(
    split: str, files: SplitFiles, images: Sequence[AnnotatedImage]
) -> SplitAnnotations:
    """The images of annotation files with the real picture in place of the name that each file has
    for it.

    A file that tells nothing, and has no picture either, is a finding.
    """
    names = [
        PictureName(stem_below(files.annotations, image.file), image.image) for image in images
    ]
    pictures = pictures_of(names, files.images[0])
    matched, notes = [], list(renaming_notes(split, files.annotations, pictures))
    for image, name in zip(images, pictures.names, strict=True):
        if image.problem and absence(files.images[0] / name):
            notes.append(finding("unreadable-labels", split, image.file, image.problem))
        else:
            matched.append(image._replace(image=name))
    return SplitAnnotations(matched, notes)


def datasets(
    splits: Mapping[str, SplitFiles],
    wanted: Sequence[str],
    annotations: Mapping[str, SplitAnnotations],
    difficult: bool = False,
) -> dict[str, RawDataset]:
    """The columns of the wanted splits; `annotations` has training's, too, where there is training.

    `difficult`: whether the format marks objects as such. Missing image sizes are read from the
    files.
    """
    names = {
        split: {o.name for image in read.images for o in image.objects}
        for split, read in annotations.items()
    }
    listed = sorted(set[str]().union(*(names.get(split, ()) for split in deciding_splits(splits))))
    raws = {}
    for split in wanted:
        ordered = dict.fromkeys([*listed, *sorted(names[split])])
        ids = {name: number for number, name in enumerate(ordered, start=1)}
        raws[split] = _dataset(split, splits[split], annotations[split], ids, difficult)
    return raws


def _dataset(
    split: str,
    files: SplitFiles,
    annotations: SplitAnnotations,
    ids: Mapping[str, int],
    difficult: bool,
) -> RawDataset:
    images, root = annotations.images, files.images[0]
    sizes = _image_sizes(images, root)
    unknown = sum(min(image.size) <= 0 and not image.problem for image in images)
    notes = list(annotations.findings)
    if unknown:
        what = f"{unknown} of {len(images)} pictures are annotated without height and width"
        notes.append(finding("size-missing", split, files.annotations, what, count=unknown))
    notes += _unreadable(split, images)
    objects = [o for image in images for o in image.objects]
    head: dict[str, Any] = {
        "split": split,
        "source": files.annotations,
        "root": root,
        "categories": tuple((number, name) for name, number in ids.items()),
        "label_files": tuple(str(image.file) for image in images),
        "findings": tuple(notes),
        "difficult": np.array([o.difficult for o in objects], dtype=np.bool_)
        if difficult
        else None,
        "written": {box: o.written for box, o in enumerate(objects) if o.written},
    }
    outlines = {
        (row, o.line): _segmentation(o)
        for row, image in enumerate(images, start=1)
        for o in image.objects
    }
    if any(o.outline for o in objects):
        head["segmentations"] = partial(_segmentations, outlines)
    columns = [(image.image, *size) for image, size in zip(images, sizes, strict=True)]
    return from_columns(head, columns, _box_rows(images, ids))


def _segmentation(each: AnnotatedObject) -> Any:
    """COCO's `segmentation` of an object."""
    if isinstance(each.outline, Mapping):
        return dict(each.outline)
    return [list(part) for part in each.outline or boxed(each.box)]


def _segmentations(
    outlines: Mapping[tuple[int, int], Any], image_ids: Sequence[int], lines: Sequence[int]
) -> list[Any]:
    """A `SegmentationReader` of what was read; images are numbered from 1."""
    return [outlines.get(key) for key in zip(image_ids, lines, strict=True)]


def _image_sizes(images: Sequence[AnnotatedImage], root: Path) -> list[tuple[int, int]]:
    """Height and width of each image, read from its file where the annotations do not say."""
    sizes = [image.size for image in images]
    absent = [row for row, size in enumerate(sizes) if min(size) <= 0]
    measured = read_sizes([root / images[row].image for row in absent]).tolist()
    for row, (height, width) in zip(absent, measured, strict=True):
        sizes[row] = height, width
    return sizes


def _unreadable(split: str, images: Sequence[AnnotatedImage]) -> Iterator[Finding]:
    for row, image in enumerate(images):
        if image.problem:
            what = f"{image.problem}: what {image.image} shows is unknown"
            yield finding("unreadable-labels", split, image.file, what, line=image.line, row=row)


def _box_rows(
    images: Iterable[AnnotatedImage], ids: Mapping[str, int]
) -> Iterator[tuple[int, int, int, Box]]:
    for row, image in enumerate(images):
        for each in image.objects:
            yield row, each.line, ids[each.name], each.box


def around(points: Sequence[Sequence[float]]) -> Box:
    """The box around points (x, y) in pixels."""
    xs, ys = [float(p[0]) for p in points], [float(p[1]) for p in points]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def boxed(box: Box) -> Polygons:
    """The outline of a box."""
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> list[float]:
    """The polygon of an ellipse that is turned by `theta` radians."""
    polygon = []
    for turn in (2 * math.pi * corner / ROUND for corner in range(ROUND)):
        x, y = rx * math.cos(turn), ry * math.sin(turn)
        polygon += [
            cx + x * math.cos(theta) - y * math.sin(theta),
            cy + x * math.sin(theta) + y * math.cos(theta),
        ]
    return polygon


def around_ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> Box:
    """The box around an ellipse that is turned by `theta` radians."""
    x = math.hypot(rx * math.cos(theta), ry * math.sin(theta))
    y = math.hypot(rx * math.sin(theta), ry * math.cos(theta))
    return cx - x, cy - y, 2 * x, 2 * y


def skipped_shapes(split: str, source: Path, skipped: Counter[str]) -> list[Finding]:
    """The finding of shapes that have no box, by kind and number; none where there are none."""
    if not skipped:
        return []
    listed = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
    what = f"{skipped.total()} shapes have no box and are left out: {listed}"
    return [finding("skipped-shapes", split, source, what, count=skipped.total())]
