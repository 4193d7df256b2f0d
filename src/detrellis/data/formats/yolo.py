"""YOLO's layout: `data.yaml` (or `classes.txt`), images, and a text file of labels for each image.

An image without a label file has no boxes. Class numbers are the category ids: 0, 1, ... Which
files these are is in `yolo_files.py`, what the lines of a label file are in `yolo_labels.py`, and
how the yaml is read in `yolo_yaml.py`.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detrellis.data.files import (
    files_in,
    list_images,
    map_threads,
    read_bytes,
    read_sizes,
    read_text,
)
from detrellis.data.findings import Finding, finding
from detrellis.data.formats import yolo_yaml
from detrellis.data.formats.lookup import real_names, renaming_notes
from detrellis.data.formats.yolo_files import label_files_of
from detrellis.data.formats.yolo_labels import (
    LongLines,
    YoloFile,
    long_lines,
    polygons_in,
    read_labels,
)
from detrellis.data.records import RawDataset, from_columns
from detrellis.data.splits import SplitFiles, deciding_splits, fixed_parts_note, select_part
from detrellis.errors import UserError

IN_PIXELS = 1.5  # relative coordinates above this are no drawing errors at the border


class YoloSplit(NamedTuple):
    """The images of one split with their label files."""

    name: str  # "train", "val" or "test"
    files: SplitFiles
    images: list[Path]
    label_folders: list[Path]  # where the label file of each image was looked for
    label_files: list[Path | None]  # the label file of each image, where there is one
    contents: list[YoloFile]
    notes: list[Finding]
    # Of all images of its places, also of those that another split has
    known_labels: frozenset[Path]

    @property
    def source(self) -> Path:
        """data.yaml or classes.txt."""
        return self.files.annotations

    def label_paths(self) -> list[Path]:
        """The label file of each image, or the one that it would have."""
        places = zip(self.images, self.label_folders, self.label_files, strict=True)
        return [file or folder / f"{image.stem}.txt" for image, folder, file in places]


def read_yolo(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits: images with the boxes of their label files.

    What lines of more than five fields are is decided once for all of them, training being asked
    too.
    """
    read = {split: _read(split, splits[split]) for split in wanted}
    deciding = list(read.values())
    long = any(
        label.around for split in deciding for content in split.contents for label in content.labels
    )
    if long:
        others = [s for s in deciding_splits(splits) if s in splits and s not in read]
        deciding += [_read(split, splits[split]) for split in others]
    label_files = [file for split in deciding for file in split.label_files]
    contents = [content for split in deciding for content in split.contents]
    declared = yolo_yaml.keypoints(next(iter(splits.values())).annotations)
    lines = long_lines(contents, label_files, declared)
    used = frozenset[Path]().union(*(split.known_labels for split in deciding))
    return {name: _dataset(split, lines, used) for name, split in read.items()}


def _read(name: str, files: SplitFiles) -> YoloSplit:
    notes: list[Finding] = []
    listed = [
        image for place in files.images for image in _listed(place, files.annotations, name, notes)
    ]
    images = list(dict.fromkeys(listed))
    label_folders, label_files = label_files_of(images)
    known = frozenset(file for file in label_files if file is not None)
    rows = select_part(range(len(images)), lambda row: images[row].stem, files.part)
    images = [images[row] for row in rows]
    label_folders = [label_folders[row] for row in rows]
    label_files = [label_files[row] for row in rows]
    notes += fixed_parts_note(name, files, "no lists of train and val")
    contents = map_threads(read_labels, label_files)
    return YoloSplit(name, files, images, label_folders, label_files, contents, notes, known)


def _listed(place: Path, source: Path, split: str, notes: list[Finding]) -> Iterator[Path]:
    """The images of a folder, or those that a text file names, on this machine or another one."""
    if place.is_dir():
        yield from list_images(place)
        return
    names = [line.strip() for line in read_text(place).splitlines() if line.strip()]
    roots = [place.parent, source.parent, place.parent.parent]
    root = next(
        (r for r in roots if any(os.path.exists(r / name) for name in names[:8])), place.parent
    )
    resolved = real_names(names, root, nearby=[source.parent])
    notes += renaming_notes(split, place, resolved)
    yield from (Path(os.path.normpath(root / name)) for name in resolved.names)


def _dataset(split: YoloSplit, lines: LongLines, used: frozenset[Path]) -> RawDataset:
    """The split's columns; `used` are the label files of all splits."""
    folders = [image.parent for image in split.images]
    root = Path(os.path.commonpath(folders)) if folders else split.source.parent
    names = yolo_yaml.class_names(split.source)
    findings = [
        *split.notes,
        *_class_count(split, names),
        *_malformed(split, lines),
        *_shared_labels(split),
        *_assumed(split, lines),
        *_in_pixels(split, lines),
        *_orphans(split, used),
    ]
    head: dict[str, Any] = {
        "split": split.name,
        "source": split.source,
        "root": root,
        "categories": names,
        "label_files": tuple(str(file) for file in split.label_paths()),
        "findings": tuple(findings),
    }
    # Boxes are relative to the picture that was labelled, and it was labelled as viewers show it.
    sizes = read_sizes(split.images).tolist()
    if lines.kind == "polygons" and any(
        label.around for content in split.contents for label in content.labels
    ):
        head["segmentations"] = partial(_segmentations, split.label_files, sizes)
    images = [
        (path.relative_to(root).as_posix(), *size)
        for path, size in zip(split.images, sizes, strict=True)
    ]
    return from_columns(head, images, _box_rows(split, sizes, lines))


def _segmentations(
    files: Sequence[Path | None],
    sizes: Sequence[Sequence[int]],
    image_ids: Sequence[int],
    lines: Sequence[int],
) -> list[Any]:
    """A `SegmentationReader`: label files are read again.
    Images are numbered from 1 in the files' order.
    """
    images = sorted(set(image_ids))
    read = dict(
        zip(images, map_threads(polygons_in, [files[image - 1] for image in images]), strict=True)
    )
    values: list[Any] = []
    for image, line in zip(image_ids, lines, strict=True):
        polygon = read[image].get(line)
        values.append(
            None if polygon is None else [(polygon * sizes[image - 1][::-1]).ravel().tolist()]
        )
    return values


def _class_count(split: YoloSplit, names: Sequence[tuple[int, str]]) -> Iterator[Finding]:
    count = yolo_yaml.class_count(split.source)
    if count is not None and count != len(names):
        yield finding(
            "class-count", split.name, split.source, f"`nc: {count}`, but `names` has {len(names)}"
        )


def _malformed(split: YoloSplit, lines: LongLines) -> Iterator[Finding]:
    """Files that cannot be read, and lines that are no labels."""
    for row, (file, content) in enumerate(zip(split.label_paths(), split.contents, strict=True)):
        if content.problem:
            yield finding("unreadable-labels", split.name, file, content.problem, row=row)
        problems = list(content.malformed)
        for label in content.labels:
            if why := lines.wrong_length(label):
                problems.append((label.line, f"line {label.line}: {why}"))
        for line, what in sorted(problems):
            yield finding("malformed-label", split.name, file, what, line=line)


def _shared_labels(split: YoloSplit) -> Iterator[Finding]:
    """Pictures that differ in their suffix and have one label file:
    unless they are copies, whose it is is unknown.
    """
    owners: dict[Path, list[int]] = defaultdict(list)
    for row, file in enumerate(split.label_files):
        if file is not None:
            owners[file].append(row)
    for file, rows in owners.items():
        images = [split.images[row] for row in rows]
        if len(rows) < 2 or len({_content(image) for image in images}) == 1:
            continue
        what = f"{file.name} could belong to {' or '.join(_told_apart(images))}"
        for row in rows:
            yield finding("shared-labels", split.name, split.images[row], what, row=row)


def _told_apart(images: Sequence[Path]) -> list[str]:
    """Their names, with the folder where names alone are the same."""
    names = [image.name for image in images]
    return (
        names
        if len(set(names)) == len(names)
        else [f"{image.parent.name}/{image.name}" for image in images]
    )


def _content(image: Path) -> bytes:
    try:
        return read_bytes(image)
    except UserError:
        return b""


def _assumed(split: YoloSplit, lines: LongLines) -> Iterator[Finding]:
    """What was assumed of long lines where the yaml does not say it."""
    rows = [
        row
        for row, content in enumerate(split.contents)
        if any(label.around for label in content.labels)
    ]
    if not rows or lines.declared is not None or lines.kind == "polygons":
        return
    fields = Counter(
        label.fields for row in rows for label in split.contents[row].labels if label.around
    )
    lengths = ", ".join(str(count) for count, _ in fields.most_common(4))
    if lines.kind == "keypoints":
        what = (
            f"lines of {lengths} fields are read as a box with keypoints behind it, which are "
            "passed over"
        )
        yield finding("keypoints", split.name, split.source, what, count=fields.total())
        return
    what = f"lines of {lengths} fields could be polygons, or boxes with keypoints behind them"
    label_paths = split.label_paths()
    for row in rows:
        yield finding("unclear-labels", split.name, label_paths[row], what, row=row)


def _box_rows(
    split: YoloSplit, sizes: Sequence[Sequence[int]], lines: LongLines
) -> Iterator[tuple[int, int, int, tuple[float, ...]]]:
    for row, (content, size) in enumerate(zip(split.contents, sizes, strict=True)):
        height, width = (max(side, 1) for side in size)
        for label in content.labels:
            if lines.has_box(label):
                x, y, w, h = lines.box(label)
                yield (
                    row,
                    label.line,
                    label.category,
                    (x * width, y * height, w * width, h * height),
                )


def _in_pixels(split: YoloSplit, lines: LongLines) -> list[Finding]:
    labels = [label for content in split.contents for label in content.labels]
    boxes = np.array([lines.box(label) for label in labels]).reshape(-1, 4)
    far = (np.abs(boxes) > IN_PIXELS).any(axis=1)
    if not len(boxes) or far.mean() < 0.5:
        return []
    what = f"{far.sum()} of {len(boxes)} boxes have coordinates far above 1: they look like pixels"
    return [finding("pixel-boxes", split.name, split.source, what, count=int(far.sum()))]


def _orphans(split: YoloSplit, used: frozenset[Path]) -> list[Finding]:
    """Label files that are not `used` by any split.
    Where text files list the images, the others belong elsewhere.
    """
    if not all(place.is_dir() for place in split.files.images):
        return []
    # Else README.txt would be one
    folders = set(split.label_folders) - {image.parent for image in split.images}
    orphans = [f for folder in sorted(folders) for f in files_in(folder, ".txt") if f not in used]
    what = "a label file without an image of this name"
    return [
        finding("label-without-image", split.name, f, what)
        for f in orphans
        if f.name != "classes.txt"
    ]
