"""CSV files with a line an object:
`filename,xmin,ymin,xmax,ymax,class` and what is called otherwise.

Columns are known by their names, in any order; without a line of names they are picture, two
corners, class. Corners are edges: `x = xmin`, `w = xmax - xmin`; in a set without a number above 1
they are relative to the picture's size. Where no column holds the lower right corner, width and
height are the box's. A line without numbers says that its picture shows nothing.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from detrellis.data.files import read_head, read_sizes, read_text
from detrellis.data.findings import Finding, finding
from detrellis.data.formats import named_classes as named
from detrellis.data.formats.lookup import fold, renaming_notes
from detrellis.data.formats.pictures import OneFileFormat, PictureName, pictures_of
from detrellis.data.records import RawDataset
from detrellis.data.splits import SplitFiles, deciding_splits, fixed_parts_note, select_part
from detrellis.errors import UserError

COLUMNS = {  # what people call them, in lower case without anything but letters and digits
    "image": (
        "filename",
        "image",
        "imagepath",
        "imagename",
        "imageid",
        "imgpath",
        "imgname",
        "img",
        "path",
        "file",
    ),
    "xmin": ("xmin", "x1", "left", "bboxxmin", "bboxx1", "bboxx", "x"),
    "ymin": ("ymin", "y1", "top", "bboxymin", "bboxy1", "bboxy", "y"),
    "xmax": ("xmax", "x2", "right", "bboxxmax", "bboxx2"),
    "ymax": ("ymax", "y2", "bottom", "bboxymax", "bboxy2"),
    "width": ("bboxwidth", "bboxw", "boxwidth", "width", "w"),
    "height": ("bboxheight", "bboxh", "boxheight", "height", "h"),
    "class": (
        "class",
        "label",
        "labelname",
        "classname",
        "category",
        "categoryname",
        "name",
        "object",
    ),
}
BARE = ("image", "xmin", "ymin", "xmax", "ymax", "class")  # the columns where no line names them
CORNERS = ("xmin", "ymin", "xmax", "ymax")
SIZED = ("xmin", "ymin", "width", "height")


class CsvObject(NamedTuple):
    """One line of a CSV file: an object, or a picture without any."""

    line: int
    image: str
    corners: tuple[float, float, float, float] | None  # None: the picture shows nothing
    name: str  # of its class
    problem: str = ""  # why the line cannot be read


# Finding


def is_boxes(file: Path) -> bool:
    """Whether the first line names the columns, or is an object by itself;
    whatever is behind it.
    """
    try:
        lines = _lines(read_head(file).partition("\n")[0])
    except (UserError, csv.Error):
        return False
    return bool(lines) and _columns(lines[0]) is not None


def _image_names(file: Path) -> list[str]:
    return list(dict.fromkeys(row.image for row in _read(file) if row.image))


CSV = OneFileFormat((".csv",), "CSV files", is_boxes, _image_names)


# Reading


def read_csv(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits. Training is always read:
    it says which name has which id, and whether numbers are relative.
    """
    rows = {}
    for split in named.with_training(splits, wanted):
        files = splits[split]
        rows[split] = select_part(
            _read(files.annotations), lambda row: Path(row.image).stem, files.part
        )
    deciding = [row for split in deciding_splits(splits) for row in rows.get(split, ())]
    deciding = deciding or [row for read in rows.values() for row in read]
    relative = _are_relative(deciding)
    annotations = {
        split: _of_split(split, splits[split], read, relative) for split, read in rows.items()
    }
    return named.datasets(splits, wanted, annotations)


def _are_relative(rows: Iterable[CsvObject]) -> bool:
    """Whether no number is above 1:
    corners are then fractions of the picture's width and height.
    """
    numbers = [
        value for row in rows if row.corners for value in row.corners if math.isfinite(value)
    ]
    return bool(numbers) and max(numbers) <= 1


def _of_split(
    split: str, files: SplitFiles, rows: Sequence[CsvObject], relative: bool
) -> named.SplitAnnotations:
    by_image: dict[str, list[CsvObject]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    folder = files.images[0]
    # Open Images' ids are names without a suffix.
    names = [
        PictureName("", name) if Path(name).suffix else PictureName(name, "") for name in by_image
    ]
    pictures = pictures_of(names, folder)
    sizes = [(0, 0)] * len(by_image)
    if relative:
        sizes = read_sizes([folder / name for name in pictures.names]).tolist()
    images = [
        _image(files.annotations, name, image_rows, (height, width), relative)
        for name, image_rows, (height, width) in zip(
            pictures.names, by_image.values(), sizes, strict=True
        )
    ]
    notes = [
        *renaming_notes(split, files.annotations, pictures),
        *fixed_parts_note(split, files, "one CSV file"),
        *_corner_note(split, files.annotations),
    ]
    return named.SplitAnnotations(images, notes)


def _image(
    file: Path, name: str, rows: Sequence[CsvObject], size: tuple[int, int], relative: bool
) -> named.AnnotatedImage:
    bad = next((row for row in rows if row.problem), None)
    if bad is not None:
        return named.AnnotatedImage(
            file, name, size, [], f"line {bad.line}: {bad.problem}", bad.line
        )
    height, width = size if relative else (1, 1)
    objects = [
        named.AnnotatedObject(r.name, _box(r.corners, (width, height)), r.line)
        for r in rows
        if r.corners
    ]
    return named.AnnotatedImage(file, name, size, objects)


def _box(corners: tuple[float, float, float, float], scale: tuple[float, float]) -> named.Box:
    left, top, right, bottom = corners
    width, height = scale
    return left * width, top * height, (right - left) * width, (bottom - top) * height


def _lines(text: str) -> list[list[str]]:
    first = text.partition("\n")[0]
    return list(csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count)))


def _columns(line: Sequence[str]) -> dict[str, int] | None:
    """Where each column is; None where the line is neither names nor an object."""
    names = [re.sub(r"[^a-z0-9]", "", fold(cell)) for cell in line]
    places = {}
    for key, spellings in COLUMNS.items():
        places[key] = next((names.index(name) for name in spellings if name in names), -1)
    for numbers in (CORNERS, SIZED):  # beside both corners, width and height are the picture's
        chosen = {key: places[key] for key in ("image", *numbers, "class")}
        if min(chosen.values()) >= 0:
            return chosen
    return {key: place for place, key in enumerate(BARE)} if _is_object(line) else None


def _is_object(line: Sequence[str]) -> bool:
    """Whether it is picture, two corners, class, or a picture that shows nothing."""
    numbers = all(_number(cell) is not None for cell in line[1:5])
    return len(line) == len(BARE) and bool(line[0]) and (numbers or not any(line[1:]))


def _read(file: Path) -> list[CsvObject]:
    """All lines but the one of names. Raises `UserError` where the columns are not known."""
    try:
        lines = _lines(read_text(file))
    except csv.Error as error:
        raise UserError(f"{file}: not a CSV file that can be read ({error})") from error
    columns = _columns(lines[0]) if lines else None
    if columns is None:
        first = ", ".join(lines[0])[:200] if lines else "nothing"
        what = f"{file}: its columns are not known (the first line: {first})"
        raise UserError(what, "Name them in the first line: filename,xmin,ymin,xmax,ymax,class.")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if any(line)]
    if not _is_object(lines[0]):
        numbered = numbered[1:]
    rows = [_object(number, line, columns) for number, line in numbered]
    if "xmax" not in columns and _have_pictures_sizes(rows):
        what = (
            f"{file}: width and height are the same for all objects of a picture, so they seem "
            "to be the picture's"
        )
        raise UserError(what, "Call the columns of the lower right corner xmax and ymax.")
    return rows


def _have_pictures_sizes(rows: Sequence[CsvObject]) -> bool:
    """Whether no picture has objects of two sizes, though some have several objects."""
    sizes: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.corners is not None:
            left, top, right, bottom = row.corners
            sizes.setdefault(row.image, []).append((round(right - left, 6), round(bottom - top, 6)))
    several = [of_image for of_image in sizes.values() if len(of_image) > 1]
    return bool(several) and all(len(set(of_image)) == 1 for of_image in several)


def _corner_note(split: str, file: Path) -> list[Finding]:
    """What `x` and `y` are taken for: some mean the centre by them."""
    names = [cell.strip().lower() for cell in _lines(read_head(file).partition("\n")[0])[0]]
    if {"x", "y"} <= set(names) and split == "train":
        return [
            finding(
                "layout", split, file, "x and y are read as the upper left corners of the boxes"
            )
        ]
    return []


def _object(number: int, line: Sequence[str], columns: Mapping[str, int]) -> CsvObject:
    cells = {
        key: line[place].strip() if place < len(line) else "" for key, place in columns.items()
    }
    sized = "xmax" not in columns
    image, numbers = cells["image"], [cells[key] for key in (SIZED if sized else CORNERS)]
    if not any(numbers):
        return CsvObject(number, image, None, "")
    values = [_number(text) for text in numbers]
    bad = next((text for text, value in zip(numbers, values, strict=True) if value is None), None)
    if bad is not None:
        return CsvObject(number, image, None, "", f"{bad!r} is no number")
    if not cells["class"]:
        return CsvObject(number, image, None, "", "no class")
    left, top, right, bottom = (value for value in values if value is not None)
    if sized:
        right, bottom = left + right, top + bottom
    return CsvObject(number, image, (left, top, right, bottom), cells["class"])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
