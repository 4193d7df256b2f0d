"""YOLO's label files: lines, and what the longer ones are.

`class cx cy w h` is a box in shares of the image. A longer line is a polygon, or a box with keypoints behind it, and
nothing in it says which: `meaning` decides for the set as a whole, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detrellis.data.files import read_text
from detrellis.data.formats.yolo_yaml import Keypoints
from detrellis.errors import UserError

Shares = tuple[float, float, float, float]  # x, y, width, height in shares of the image
Meaning = Literal["polygons", "keypoints", "unclear"]
SAMPLE = 200  # long lines that decide what they are
SLACK = 0.01  # of the image, by which rounding and sloppy points may miss
FITTING = 0.95  # share of lines of which boxes must hold their points, to be keypoints
MISFIT = 0.5
SIMPLE = 0.75  # share of lines that must not cross themselves, to be polygons


class Label(NamedTuple):
    """One line of a label file."""

    line: int
    category: int
    box: Shares  # of its first four numbers
    around: Shares | None  # around all its points; None where it has but a box
    fields: int


class Labels(NamedTuple):
    """One label file."""

    labels: list[Label]
    malformed: list[tuple[int, str]]  # (line, what is wrong)
    problem: str = ""  # why the file cannot be read


def read_labels(file: Path | None) -> Labels:
    """All lines of a label file; none of None."""
    labels, malformed = [], []
    try:
        text = "" if file is None else read_text(file)
    except UserError as error:
        return Labels([], [], error.message.removeprefix(f"{file}: "))
    if "\0" in text:
        return Labels([], [], "not a text file")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            labels.append(parse_line(line, number))
        except ValueError as error:
            malformed.append((number, f"line {number}: {error}: {line.strip()[:60]!r}"))
    return Labels(labels, malformed)


def parse_line(line: str, number: int = 0) -> Label:
    """A label line. Raises `ValueError` saying what is wrong with it."""
    fields = line.split()
    try:
        category, *numbers = (float(field) for field in fields)
    except ValueError:
        separated = any(mark in line for mark in ",;")
        raise ValueError("fields must have spaces between them" if separated else "not all are numbers") from None
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
    return Label(number, int(category), box, around, len(fields))


# What long lines are


def meaning(labels: Sequence[Labels], files: Sequence[Path | None], said: Keypoints | None) -> Meaning:
    """What the lines of more than five fields in all these files are, by the yaml or by their numbers."""
    if said is not None:
        return "keypoints" if said.points else "polygons"
    long = [file for file, own in zip(files, labels, strict=True) if any(label.around for label in own.labels)]
    step = max(1, -(-len(long) // SAMPLE))
    lines = [numbers for file in long[::step] if file is not None for numbers in _long_lines(file)]
    return decide(lines[:: max(1, -(-len(lines) // SAMPLE))]) if lines else "polygons"


def _long_lines(file: Path) -> list[NDArray[np.float64]]:
    rows = (line.split()[1:] for line in read_text(file).splitlines())
    found = []
    for row in rows:
        try:
            found += [np.array(row, dtype=np.float64)] if len(row) > 5 else []
        except ValueError:
            continue  # malformed
    return found


def decide(lines: Sequence[NDArray[np.float64]]) -> Meaning:
    """Of the numbers behind the class in each line.

    Keypoints lie in their box, are (0, 0) where they are missing, and may carry 0, 1 or 2 for "visible". Read as a
    polygon such a line crosses itself, because its second point is a size. Polygons seldom do, and half of them fit as
    keypoints by chance; rectangles at an angle (oriented boxes) are known by their sides.
    """
    flagged = all(_flagged(line) for line in lines)
    inside = sum(_fits(line, 3 if flagged else 2) for line in lines) / len(lines)
    no_polygon = any(len(line) % 2 or (line < -0.5).any() or (line > 1.5).any() for line in lines)
    if flagged and (inside > MISFIT or no_polygon):
        return "keypoints"
    if all(_is_parallelogram(line) for line in lines):
        return "polygons"
    simple = sum(not _crosses_itself(line) for line in sorted(lines, key=len)[:50]) / min(len(lines), 50)
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
    low, high = line[:2] - line[2:4] / 2, line[:2] + line[2:4] / 2
    room = SLACK + 0.05 * line[2:4]
    whole = (line[2:4] > 0).all() and (low >= -SLACK).all() and (high <= 1 + SLACK).all()
    return bool(whole and (points[:, :2] >= low - room).all() and (points[:, :2] <= high + room).all())


def _is_parallelogram(line: NDArray[np.float64]) -> bool:
    """Whether four points, whose diagonals halve each other."""
    if len(line) != 8:
        return False
    a, b, c, d = line.reshape(4, 2)
    return bool(np.abs(a + c - b - d).max() <= SLACK)


def _crosses_itself(line: NDArray[np.float64]) -> bool:
    """Whether two sides of the polygon cross."""
    a = line[: len(line) // 2 * 2].reshape(-1, 2)
    b = np.roll(a, -1, axis=0)
    side = b - a
    # Of each corner to each side: left, right or on it.
    from_a = np.sign(_cross(side[:, None], a[None] - a[:, None]))
    from_b = np.sign(_cross(side[:, None], b[None] - a[:, None]))
    apart = from_a * from_b < 0
    return bool((apart & apart.T).any())


def _cross(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
    return found


def wrong_length(label: Label, way: Meaning, said: Keypoints | None) -> str:
    """Why a line of this length is none of the set's; "" where it is one."""
    if label.around is None:
        return ""
    if way == "polygons":
        fits = label.fields % 2 == 1 and label.fields >= 7
        return "" if fits else f"{label.fields} fields, neither a box (5) nor a polygon (odd, at least 7)"
    if way == "keypoints" and said is not None and label.fields != 5 + said.points * said.values:
        return f"{label.fields} fields, and a box with the keypoints of `kpt_shape` has {5 + said.points * said.values}"
    return ""
