"""The tags of boxes: what they say, how large they are, and where they hide least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from detrellis.visualize.fonts import font_of

Rectangle = tuple[float, float, float, float]  # x1, y1, x2, y2
Floats = NDArray[np.float64]
LONGEST = 28  # letters of a name in a tag; the legend has it whole


@dataclass(frozen=True)
class Mark:
    """One box to draw."""

    box: Rectangle
    label: int
    name: str
    score: float | None


class Style(NamedTuple):
    """How this picture is drawn."""

    line: int  # of the largest boxes
    font: ImageFont.FreeTypeFont
    legend_font: ImageFont.FreeTypeFont
    crowded: bool  # tags show the score only


class Tag(NamedTuple):
    """A label beside a box."""

    box: Rectangle
    text: str
    label: int


def style_of(marks: Sequence[Mark], size: tuple[int, int], font: str | None) -> Style:
    """How a picture is drawn: sizes follow the picture's,
    and the more of it the tags would cover, the smaller.
    """
    area = size[0] * size[1]
    unit = math.sqrt(area) / 560
    # The largest letters with which the tags cover no more than 13 % of the picture; crowded where
    # none do.
    letters = sum(len(_text(m, False)) + 1 for m in marks)
    full = max(11.0, 15 * unit)
    heights = [full, max(11.0, 0.85 * full), max(11.0, 0.72 * full)]
    fitting = [h for h in heights if letters * (0.55 * h) * (1.3 * h) <= 0.13 * area]
    height = fitting[0] if fitting else heights[-1]
    width = 3.0 if len(marks) <= 12 else 2.4 if len(marks) <= 40 else 1.6
    line = max(1, round(width * unit))
    return Style(
        line, font_of(font, round(height)), font_of(font, round(full)), crowded=not fitting
    )


def _text(mark: Mark, crowded: bool) -> str:
    name = mark.name if len(mark.name) <= LONGEST else mark.name[: LONGEST - 1] + "…"
    if mark.score is None:
        return "" if crowded else name
    return f"{mark.score:.2f}".removeprefix("0") if crowded else f"{name} {mark.score:.2f}"


def place_tags(marks: Sequence[Mark], style: Style, size: tuple[int, int]) -> list[Tag]:
    """A tag for every mark that has room for one; the best scores choose first."""
    boxes, taken = np.array([m.box for m in marks]).reshape(-1, 4), np.zeros((len(marks), 4))
    placed: list[Tag] = []
    order = sorted(range(len(marks)), key=lambda i: -(marks[i].score or 0))
    for i in order:
        for text in _texts(marks[i], style):
            tag, hidden = _best_place(marks[i], text, style, size, boxes, taken[: len(placed)])
            if hidden <= 0.1:
                taken[len(placed)] = tag.box
                placed.append(tag)
                break
    return placed


def _texts(mark: Mark, style: Style) -> list[str]:
    """What the tag may say, the best first;
    in a crowd a name stands only where it is short beside its box.
    """
    full, brief = _text(mark, False), _text(mark, True)
    roomy = _tag_size(full, style.font)[0] <= 0.6 * (mark.box[2] - mark.box[0])
    return [t for t in ((full, brief) if roomy or not style.crowded else (brief,)) if t]


def _best_place(
    mark: Mark, text: str, style: Style, size: tuple[int, int], boxes: Floats, tags: Floats
) -> tuple[Tag, float]:
    """The tag where it covers least of `boxes (N, 4)` and `tags (M, 4)`,
    and the fraction of it that lies on tags.
    """
    width, height = _tag_size(text, style.font)
    x1, y1, x2, y2 = mark.box
    # Above and below the box, inside it, beside it; of equal places the first.
    corners = [
        (x1, y1 - height),
        (x1, y2),
        (x2 - width, y1 - height),
        (x2 - width, y2),
        (x1, y1),
        (x2 - width, y1),
    ]
    corners += [(x1, y2 - height), (x2 - width, y2 - height), (x2, y1), (x1 - width, y1)]
    low = np.array(corners).clip(0, (size[0] - width, size[1] - height))
    spots = np.hstack([low, low + np.array([width, height])])
    around = np.hstack([low.min(axis=0), spots[:, 2:].max(axis=0)])[None]
    boxes, tags = (others[_overlaps(around, others)[0] > 0] for others in (boxes, tags))
    hidden = _overlaps(spots, tags).sum(axis=1) / (width * height)
    # A tag on a small box hides the object; on a large one it hides a corner.
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).clip(min=1)
    inner = (_overlaps(spots, boxes) / areas).clip(max=1).sum(axis=1)
    best = int((10 * hidden + inner + 0.03 * np.arange(len(spots))).argmin())
    x1, y1, x2, y2 = spots[best].tolist()
    return Tag((x1, y1, x2, y2), text, mark.label), float(hidden[best])


def _overlaps(boxes: Floats, others: Floats) -> Floats:
    """`(M, N)` square pixels in which each of `boxes (M, 4)` and each of `others (N, 4)`
    overlap.
    """
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    area: Floats = (np.minimum(boxes[:, None, 2:], others[:, 2:]) - low).clip(min=0).prod(axis=2)
    return area


def _tag_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    return math.ceil(font.getlength(text) + 0.6 * font.size), math.ceil(1.25 * font.size)
