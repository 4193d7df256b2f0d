"""Pictures whose boxes can be judged: noise with red squares ("cat") and blue squares ("dog").

A box is right where at least 0.8 of it has its class's colour in the picture as viewers show it.
The writers put the same truth into COCO's, Pascal VOC's and YOLO's form; each case then spoils what
it is about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from detrellis.data.annotations import Annotations
from detrellis.data.records import RawDataset

WIDTH, HEIGHT = 96, 64
CLASSES = ("cat", "dog")
IDS = {"cat": 1, "dog": 2}  # of COCO's categories
COLOURS = {"cat": (230, 20, 20), "dog": (20, 20, 230)}
RIGHT = 0.8  # share of a box that must have its class's colour


class Box(NamedTuple):
    """An object in pixels."""

    name: str
    x: int
    y: int
    w: int
    h: int


# What each picture shows. No two boxes of a picture overlap, and turned or mirrored none of them
# lies on itself.
TRUTH: tuple[tuple[Box, ...], ...] = (
    (Box("dog", 6, 8, 24, 20), Box("cat", 60, 34, 20, 16)),
    (Box("cat", 10, 4, 30, 18), Box("dog", 52, 30, 28, 24)),
    (Box("cat", 50, 6, 22, 22),),
    (Box("dog", 4, 30, 26, 26), Box("cat", 40, 10, 16, 30)),
    (Box("dog", 62, 8, 20, 28), Box("cat", 8, 36, 34, 20)),
    (Box("cat", 12, 12, 36, 26),),
)
PICTURES = len(TRUTH)
OBJECTS = sum(len(boxes) for boxes in TRUTH)


def name_of(number: int, suffix: str = ".jpg") -> str:
    """`p0.jpg`, `p1.jpg`, ..."""
    return f"p{number}{suffix}"


def picture(
    boxes: Iterable[Box], seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> Image.Image:
    """Grey noise of `size` (width, height) with the boxes in their colours."""
    noise = np.random.default_rng(seed).integers(70, 180, (size[1], size[0], 1), dtype=np.uint8)
    pixels = noise.repeat(3, axis=2)
    for box in boxes:
        pixels[box.y : box.y + box.h, box.x : box.x + box.w] = COLOURS[box.name]
    return Image.fromarray(pixels)


def save(number: int, path: Path, **options: Any) -> Path:
    """Picture `number` as the file `path`, in the format of its suffix or of `format`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".jpg", ".jpeg", ".jfif"):
        options = {"format": "JPEG", "quality": 95, "subsampling": 0} | options
    picture(TRUTH[number], number).save(path, **options)
    return path


def save_all(folder: Path, numbers: Iterable[int] = range(PICTURES), suffix: str = ".jpg") -> None:
    """The pictures as `folder/p0.jpg`, ..."""
    for number in numbers:
        save(number, folder / name_of(number, suffix))


def coco(
    numbers: Sequence[int] = range(PICTURES), names: Sequence[str] | None = None
) -> dict[str, Any]:
    """A COCO file's content: image ids 1, 2, ...; `names` are the `file_name`s."""
    names = [name_of(number) for number in numbers] if names is None else names
    owned = [(place + 1, box) for place, number in enumerate(numbers) for box in TRUTH[number]]
    return {
        "images": [
            {"id": place + 1, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for place, name in enumerate(names)
        ],
        "annotations": [
            {
                "id": row + 1,
                "image_id": image,
                "category_id": IDS[box.name],
                "bbox": [box.x, box.y, box.w, box.h],
                "area": box.w * box.h,
                "iscrowd": 0,
            }
            for row, (image, box) in enumerate(owned)
        ],
        "categories": [{"id": IDS[name], "name": name} for name in CLASSES],
    }


def write_json(file: Path, content: Any, encoding: str = "utf-8") -> Path:
    """`content` as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding=encoding)
    return file


def voc_xml(number: int, file_name: str | None = None) -> str:
    """The XML of picture `number`, pixels counted from 1."""
    objects = "".join(
        f"<object><name>{b.name}</name><bndbox><xmin>{b.x + 1}</xmin><ymin>{b.y + 1}</ymin>"
        f"<xmax>{b.x + b.w}</xmax><ymax>{b.y + b.h}</ymax></bndbox></object>"
        for b in TRUTH[number]
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><filename>{file_name or name_of(number)}</filename>{size}{objects}</annotation>"


def write_voc(folder: Path, numbers: Iterable[int] = range(PICTURES)) -> None:
    """`folder/p0.xml`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / name_of(number, ".xml")).write_text(voc_xml(number))


def yolo_lines(number: int) -> str:
    """The label file of picture `number`."""
    rows = ((CLASSES.index(b.name), b.x + b.w / 2, b.y + b.h / 2, b.w, b.h) for b in TRUTH[number])
    return "".join(
        f"{c} {x / WIDTH} {y / HEIGHT} {w / WIDTH} {h / HEIGHT}\n" for c, x, y, w, h in rows
    )


def write_labels(folder: Path, numbers: Iterable[int] = range(PICTURES)) -> None:
    """`folder/p0.txt`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / name_of(number, ".txt")).write_text(yolo_lines(number))


YAML = "names: [cat, dog]\ntrain: images/train\nval: images/val\n"
SPLITS = {"train": (0, 1, 2, 3), "val": (4, 5)}


def yolo_set(folder: Path, yaml: str = YAML) -> Path:
    """images/train, images/val, labels/train, labels/val and data.yaml."""
    for split, numbers in SPLITS.items():
        save_all(folder / "images" / split, numbers)
        write_labels(folder / "labels" / split, numbers)
    (folder / "data.yaml").write_text(yaml)
    return folder


# The judge


class Seen(NamedTuple):
    """A box as a reader gave it."""

    path: Path
    name: str
    box: tuple[float, ...]  # x, y, width, height in pixels


def seen(data: RawDataset | Annotations) -> Iterator[Seen]:
    """Every box with its picture and class."""
    if isinstance(data, RawDataset):
        names = dict(data.categories)
        for row, category, box in zip(data.box_rows, data.box_categories, data.boxes, strict=True):
            yield Seen(data.path(int(row)), names[int(category)], tuple(box.tolist()))
        return
    for image in range(len(data)):
        for row in range(data.starts[image], data.starts[image + 1]):
            yield Seen(
                data.path(image),
                data.classes.names[data.labels[row]],
                tuple(data.boxes[row].tolist()),
            )


def wrong(data: RawDataset | Annotations) -> list[str]:
    """The boxes that are not right, in words; none where all are."""
    pictures: dict[Path, NDArray[np.uint8]] = {}
    found = []
    for path, name, box in seen(data):
        if path not in pictures:
            with Image.open(path) as image:
                pictures[path] = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        share = coloured(pictures[path], name, box)
        if share < RIGHT:
            found.append(f"{path.name}: {name} {box}: {share:.2f} of it")
    return found


def coloured(pixels: NDArray[np.uint8], name: str, box: Sequence[float]) -> float:
    """The share of `box` that has the colour of the class `name` (in any case, whatever spaces are
    around it).
    """
    x, y, w, h = box
    left, top, right, bottom = (round(v) for v in (x, y, x + w, y + h))
    patch = pixels[max(top, 0) : bottom, max(left, 0) : right].astype(int)
    area = (bottom - top) * (right - left)
    if area <= 0:
        return 0.0
    distance = np.abs(patch - np.array(COLOURS[name.strip(" \u200b").lower()])).max(axis=2)
    return float((distance < 60).sum() / area)
