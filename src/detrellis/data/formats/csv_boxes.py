"""CSV files with a line an object: `filename,xmin,ymin,xmax,ymax,class` and what is called otherwise.

Columns are known by their names, in any order; without a line of names they are picture, two corners, class. Corners
are edges: `x = xmin`, `w = xmax - xmin`; a set without a number above 1 has shares of the image. A line with empty
corners says that its picture shows nothing.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.files import files_in, read_sizes, read_text, subfolders
from detrellis.data.formats.lookup import fold, renaming_notes
from detrellis.data.formats.named_classes import Box, Record, Thing, class_names, dataset
from detrellis.data.formats.pictures import Wanted, files_of_splits, image_folder, pictures_of, splits_by_name, spread
from detrellis.data.records import RawDataset
from detrellis.data.splits import HELD_OUT, SplitFiles, held_out
from detrellis.errors import UserError

COLUMNS = {  # what people call them, in lower case without anything but letters and digits
    "image": ("filename", "image", "imagepath", "imagename", "imageid", "imgpath", "imgname", "img", "path", "file"),
    "xmin": ("xmin", "x1", "left", "bboxxmin", "bboxx1"),
    "ymin": ("ymin", "y1", "top", "bboxymin", "bboxy1"),
    "xmax": ("xmax", "x2", "right", "bboxxmax", "bboxx2"),
    "ymax": ("ymax", "y2", "bottom", "bboxymax", "bboxy2"),
    "class": ("class", "label", "labelname", "classname", "category", "categoryname", "name", "object"),
}
BARE = ("image", "xmin", "ymin", "xmax", "ymax", "class")  # the columns where no line names them
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Row(NamedTuple):
    """One line."""

    line: int
    image: str
    corners: tuple[float, float, float, float] | None  # None: the picture shows nothing
    name: str
    problem: str = ""


# Finding


def is_boxes(file: Path) -> bool:
    """Whether the first line names the columns, or is an object by itself."""
    try:
        lines = _lines(read_text(file))
    except (UserError, csv.Error):
        return False
    return bool(lines) and _columns(lines[0]) is not None


def find_csv(data: Path, given: Mapping[str, Path | None]) -> dict[str, SplitFiles] | None:
    """The CSV files of a folder; None where there are none. Raises `UserError` where names do not tell the splits."""
    files = [f for folder in [data, *subfolders(data, 1)] for f in files_in(folder, ".csv") if is_boxes(f)]
    found = splits_by_name(data, files, "CSV files")
    return None if found is None else csv_splits(found.files, given, data, parts=found.parts)


def csv_splits(
    files: Mapping[str, Path], given: Mapping[str, Path | None], data: Path | None = None, parts: bool = False
) -> dict[str, SplitFiles]:
    """The files with their image folders; `parts`: one file is train and val together."""
    return files_of_splits(files, given, lambda file: _images_of(file, data), parts)


def _images_of(file: Path, data: Path | None) -> Path:
    names = list(dict.fromkeys(row.image for row in _rows(file) if row.image))
    wanted = [Wanted(str(path), str(path)) for path in spread([Path(name.replace("\\", "/")) for name in names])]
    wanted = [Wanted(w.stem.rpartition(".")[0] or w.stem, w.written) for w in wanted]
    return image_folder(file, (file.parent, data or file.parent.parent), wanted)


# Reading


def read_csv(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits; training is always read: it says which name has which id, and whether numbers are shares."""
    rows = {split: _own_rows(splits[split]) for split in dict.fromkeys(["train", *wanted]) if split in splits}
    deciding = rows.get("train") or [row for own in rows.values() for row in own]
    numbers = [v for row in deciding if row.corners for v in row.corners if math.isfinite(v)]
    shares = bool(numbers) and max(numbers) <= 1
    read = {split: _records(split, splits[split], own, shares) for split, own in rows.items()}
    names = class_names({split: records for split, (records, _) in read.items()}, wanted)
    found = {}
    for split in wanted:
        records, notes = read[split]
        found[split] = dataset(split, splits[split].annotations, splits[split].images[0], records, names[split], notes)
    return found


def _own_rows(files: SplitFiles) -> list[Row]:
    rows = _rows(files.annotations)
    if files.part is None:
        return rows
    out = held_out(Path(row.image).stem for row in rows)
    return [row for row in rows if (Path(row.image).stem in out) == (files.part == "val")]


def _records(split: str, files: SplitFiles, rows: Sequence[Row], shares: bool) -> tuple[list[Record], list[Finding]]:
    folder = files.images[0]
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    stems = [name if not Path(name).suffix else "" for name in by_image]  # Open Images' ids have no suffix
    pictures = pictures_of(
        [Wanted(stem, "" if stem else name) for stem, name in zip(stems, by_image, strict=True)], folder
    )
    sizes = read_sizes([folder / name for name in pictures.names]).tolist() if shares else [(0, 0)] * len(by_image)
    records = []
    for name, own, (height, width) in zip(pictures.names, by_image.values(), sizes, strict=True):
        scale = (width, height) if shares else (1, 1)
        bad = next((row for row in own if row.problem), None)
        things = [Thing(row.name, _box(row.corners, scale), row.line) for row in own if row.corners]
        size = (height, width) if shares else (0, 0)
        if bad is not None:
            records.append(Record(files.annotations, name, size, [], f"line {bad.line}: {bad.problem}", bad.line))
        else:
            records.append(Record(files.annotations, name, size, things))
    notes = list(renaming_notes(split, files.annotations, pictures))
    if split == "train" and files.part is not None:
        what = f"one CSV file: a fixed {HELD_OUT - 1} in {HELD_OUT} images train, the others validate"
        notes.append(finding("layout", split, files.annotations, what))
    return records, notes


def _box(corners: tuple[float, float, float, float], scale: tuple[float, float]) -> Box:
    left, top, right, bottom = corners
    return left * scale[0], top * scale[1], (right - left) * scale[0], (bottom - top) * scale[1]


def _lines(text: str) -> list[list[str]]:
    first = text.partition("\n")[0]
    return list(csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count)))


def _columns(line: Sequence[str]) -> dict[str, int] | None:
    """Where each column is; None where the line is neither names nor an object."""
    names = [re.sub(r"[^a-z0-9]", "", fold(cell)) for cell in line]
    found = {key: next((names.index(n) for n in ways if n in names), -1) for key, ways in COLUMNS.items()}
    if min(found.values()) >= 0:
        return found
    return {key: place for place, key in enumerate(BARE)} if _is_object(line) else None


def _is_object(line: Sequence[str]) -> bool:
    """Whether it is picture, two corners, class, or a picture that shows nothing."""
    numbers = all(_number(cell) is not None for cell in line[1:5])
    return len(line) == len(BARE) and bool(line[0]) and (numbers or not any(line[1:]))


def _rows(file: Path) -> list[Row]:
    """All lines. Raises `UserError` where the columns are not known."""
    try:
        lines = _lines(read_text(file))
    except csv.Error as error:
        raise UserError(f"{file}: not a CSV file that can be read ({error})") from error
    columns = _columns(lines[0]) if lines else None
    if columns is None:
        first = ", ".join(lines[0])[:200] if lines else "nothing"
        what = f"{file}: its columns are not known (the first line: {first})"
        raise UserError(what, "Name them in the first line: filename,xmin,ymin,xmax,ymax,class.")
    bare = _is_object(lines[0])
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if any(line)]
    return [_row(number, line, columns) for number, line in (numbered if bare else numbered[1:])]


def _row(number: int, line: Sequence[str], columns: Mapping[str, int]) -> Row:
    cells = {key: line[place].strip() if place < len(line) else "" for key, place in columns.items()}
    corners = [cells[key] for key in CORNERS]
    if not any(corners):
        return Row(number, cells["image"], None, "")
    values = [_number(text) for text in corners]
    bad = next((text for text, value in zip(corners, values, strict=True) if value is None), None)
    if bad is not None:
        return Row(number, cells["image"], None, "", f"{bad!r} is no number")
    if not cells["class"]:
        return Row(number, cells["image"], None, "", "no class")
    left, top, right, bottom = (value for value in values if value is not None)
    return Row(number, cells["image"], (left, top, right, bottom), cells["class"])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
