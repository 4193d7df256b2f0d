"""YOLO's label files: lines, and what the longer ones are.

`class cx cy w h` is a box, relative to the image's width and height. A longer line is a polygon, or
a box with keypoints behind it, and nothing in it says which: `long_lines` decides for the set as a
whole, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detrellis.data.files import read_text
from detrellis.data.formats.pictures import spread
from detrellis.data.formats.yolo_yaml import Keypoints
from detrellis.errors import UserError

RelativeBox = tuple[float, float, float, float]  # x, y, width, height, relative to the image's
LineKind = Literal["polygons", "keypoints", "unclear"]
SAMPLE = 200  # long lines that decide what they are
SLACK = 0.01  # of the image, by which rounding and sloppy points may miss
FITTING = 0.95  # fraction of lines whose boxes must hold their points, to be keypoints
MISFIT = 0.5
SIMPLE = 0.75  # fraction of lines that must not cross themselves, to be polygons


class YoloLabel(NamedTuple):
    """One line of a label file."""

    line: int
    category: int
    box: RelativeBox  # of its first four numbers
    # Around all its points, of a line of more than five fields; else None
    around: RelativeBox | None
    fields: int


class YoloFile(NamedTuple):
    """The content of one label file."""

    labels: list[YoloLabel]
    malformed: list[tuple[int, str]]  # (line, what is wrong)
    problem: str = ""  # why the file cannot be read


def read_labels(file: Path | None) -> YoloFile:
    """All lines of a label file; none of None."""
    labels, malformed = [], []
    try:
        text = "" if file is None else read_text(file)
    except UserError as error:
        return YoloFile([], [], error.message.removeprefix(f"{file}: "))
    if "\0" in text:
        return YoloFile([], [], "not a text file")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            labels.append(parse_line(line, number))
        except ValueError as error:
            malformed.append((number, f"line {number}: {error}: {line.strip()[:60]!r}"))
    return YoloFile(labels, malformed)


def parse_line(line: str, number: int = 0) -> YoloLabel:
    """A label line. Raises `ValueError` saying what is wrong with it."""
    fields = line.split()
    try:
        category, *numbers = (float(field) for field in fields)
    except ValueError:
        separated = any(mark in line for mark in ",;")
        raise ValueError(
            "fields must have spaces between them" if separated else "not all are numbers"
        ) from None
    if not math.isfinite(category) or category != int(category):
        raise ValueError("the class is no whole number")
    if len(numbers) < 4:
        raise ValueError(f"{len(fields)} fields, and a box has 5")
    if len(numbers) == 5:
        raise ValueError("6 fields, and a box has 5: is the last one a confidence?")
    cx, cy, width, height = numbers[:4]
    box = (cx - width / 2, cy - height / 2, width, height)
    around = None
    if len(numbers) > 4:
        xs, ys = numbers[::2], numbers[1::2]
        around = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
    return YoloLabel(number, int(category), box, around, len(fields))


def polygons_in(file: Path | None) -> dict[int, NDArray[np.float64]]:
    """The polygons `(n, 2)` of a label file, in shares of the image, by their lines;
    those of boxes are left out.
    """
    polygons = {}
    for number, line in enumerate(
        read_text(file).splitlines() if file is not None else (), start=1
    ):
        values = line.split()[1:]
        if len(values) >= 6 and len(values) % 2 == 0:
            with suppress(ValueError):  # a malformed line
                polygons[number] = np.array(values, dtype=np.float64).reshape(-1, 2)
    return polygons


# What long lines are


class LongLines(NamedTuple):
    """What the lines of more than five fields are, in a set as a whole."""

    kind: LineKind
    declared: Keypoints | None  # what the yaml says; None where the numbers decided

    def box(self, label: YoloLabel) -> RelativeBox:
        """The box that a line means: around its polygon, or of its first four numbers."""
        return label.around if label.around is not None and self.kind == "polygons" else label.box

    def has_box(self, label: YoloLabel) -> bool:
        """Whether it is known what box the line means."""
        return label.around is None or (self.kind != "unclear" and not self.wrong_length(label))

    def wrong_length(self, label: YoloLabel) -> str:
        """Why a line of this length is none of the set's; "" where it is one."""
        if label.around is None:
            return ""
        if self.kind == "polygons":
            fits = label.fields % 2 == 1 and label.fields >= 7
            return (
                ""
                if fits
                else f"{label.fields} fields, neither a box (5) nor a polygon (odd, at least 7)"
            )
        if self.kind == "unclear" or self.declared is None:
            return ""
        expected = 5 + self.declared.points * self.declared.values
        if label.fields == expected:
            return ""
        return f"{label.fields} fields, and a box with the keypoints of `kpt_shape` has {expected}"


def long_lines(
    contents: Sequence[YoloFile], files: Sequence[Path | None], declared: Keypoints | None
) -> LongLines:
    """What the lines of more than five fields in all these files are,
    by the yaml or by their numbers.
    """
    if declared is not None:
        return LongLines("keypoints" if declared.points else "polygons", declared)
    with_long = [
        file
        for file, content in zip(files, contents, strict=True)
        if file is not None and any(label.around for label in content.labels)
    ]
    lines = [numbers for file in spread(with_long, SAMPLE) for numbers in _long_lines(file)]
    return LongLines(decide(spread(lines, SAMPLE)) if lines else "polygons", None)


def _long_lines(file: Path) -> list[NDArray[np.float64]]:
    """The numbers behind the class of each long line."""
    lines = []
    for line in read_text(file).splitlines():
        numbers = line.split()[1:]
        with suppress(ValueError):  # a malformed line
            lines += [np.array(numbers, dtype=np.float64)] if len(numbers) > 5 else []
    return lines


def decide(lines: Sequence[NDArray[np.float64]]) -> LineKind:
    """What long lines are, by the numbers behind the class in each of them.

    Keypoints lie in their box, are (0, 0) where they are missing, and may carry 0, 1 or 2 for
    "visible". Read as a polygon such a line crosses itself, because its second point is a size.
    Polygons seldom do, and half of them fit as keypoints by chance; rectangles at an angle
    (oriented boxes) are known by their sides.
    """
    flagged = all(_flagged(line) for line in lines)
    inside = sum(_fits(line, 3 if flagged else 2) for line in lines) / len(lines)
    no_polygon = any(len(line) % 2 or (line < -0.5).any() or (line > 1.5).any() for line in lines)
    if flagged and (inside > MISFIT or no_polygon):
        return "keypoints"
    if all(_is_parallelogram(line) for line in lines):
        return "polygons"
    shortest = sorted(lines, key=len)[:50]
    simple = sum(not crosses_itself(line) for line in shortest) / len(shortest)
    if inside >= FITTING and simple <= MISFIT:
        return "keypoints"
    # A triangle cannot cross itself, so that it must fit badly.
    fitting = FITTING if any(len(line) > 6 for line in lines) else MISFIT
    return "polygons" if inside < fitting and simple >= SIMPLE else "unclear"


def _flagged(line: NDArray[np.float64]) -> bool:
    """Whether every third number behind the box is 0, 1 or 2."""
    return (len(line) - 4) % 3 == 0 and bool(np.isin(line[6::3], (0, 1, 2)).all())


def _fits(line: NDArray[np.float64], values: int) -> bool:
    """Whether the box is in the image, and the points behind it are in the box."""
    if (len(line) - 4) % values:
        return False
    points = line[4:].reshape(-1, values)
    points = points[(points[:, :2] != 0).any(axis=1)]
    centre, size = line[:2], line[2:4]
    low, high = centre - size / 2, centre + size / 2
    in_image = (size > 0).all() and (low >= -SLACK).all() and (high <= 1 + SLACK).all()
    room = SLACK + 0.05 * size
    return bool(
        in_image and (points[:, :2] >= low - room).all() and (points[:, :2] <= high + room).all()
    )


def _is_parallelogram(line: NDArray[np.float64]) -> bool:
    """Whether the line is four points whose diagonals halve each other."""
    if len(line) != 8:
        return False
    a, b, c, d = line.reshape(4, 2)
    return bool(np.abs(a + c - b - d).max() <= SLACK)


def crosses_itself(line: NDArray[np.float64]) -> bool:
    """Whether two sides of the polygon (x1, y1, x2, y2, ...) cross."""
    a = line[: len(line) // 2 * 2].reshape(-1, 2)
    b = np.roll(a, -1, axis=0)
    side = b - a
    # Of each corner to each side: left, right or on it.
    from_a = np.sign(_cross(side[:, None], a[None] - a[:, None]))
    from_b = np.sign(_cross(side[:, None], b[None] - a[:, None]))
    apart = from_a * from_b < 0
    return bool((apart & apart.T).any())


def _cross(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
    return product
