"""Pictures of boxes and masks: detections or ground truth on an image, and sheets of such pictures.
Needs Pillow only; masks need hotcoco."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from detrellis.overlay import paint_masks

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # x1, y1, x2, y2
Floats = NDArray[np.float64]

# Each as far as possible from those before it in OKLab, the first ones vivid: most data sets have
# few classes.
PALETTE = [
    0x00A5FF, 0xFF7A00, 0x2ED12E, 0xFF3DCB, 0xFFD400, 0x9A5CFF, 0xFF3B30, 0x00D9C0,
    0xFFB4F0, 0x878700, 0xB46996, 0x87FF87, 0xB4B45A, 0x00A596, 0xB496F0, 0xFFB487,
    0xF087A5, 0x5AFFFF, 0x00A500, 0xD200F0, 0xC3692D, 0x87C3FF, 0x6978D2, 0xF00078,
]  # fmt: skip
# Of later classes: black (0) or white, and how much of it
SHADES = ((0, 0.0), (255, 0.4), (0, 0.25), (255, 0.65))
LONGEST = 28  # letters of a name in a tag; the legend has it whole
NARROWEST = 160  # pixels of a drawn picture with boxes: a tag's width
BACKGROUND, BAR, INK = (24, 24, 28), (44, 44, 52), (240, 240, 240)

# Pillow's own font has no letters beyond ASCII; where a name needs them, the first of these that
# has them all.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msyh.ttc",
)


def colour_of(label: int) -> Colour:
    """The colour of a class index, the same in every picture."""
    value = PALETTE[label % len(PALETTE)]
    shade, weight = SHADES[label // len(PALETTE) % len(SHADES)]
    red, green, blue = (
        round((value >> shift & 255) * (1 - weight) + shade * weight) for shift in (16, 8, 0)
    )
    return red, green, blue


def draw_detections(
    image: Image.Image,
    boxes: Any,
    labels: Any,
    scores: Any = None,
    names: Sequence[str] | None = None,
    *,
    masks: Sequence[bytes] | None = None,
    min_side: int = 640,
    legend: bool = True,
) -> Image.Image:
    """A copy of `image` with its boxes, a tag on each (class and score) and a legend of the classes
    below.

    With `masks`, the run lengths (COCO's, compressed) of each object in the image, these are drawn
    and boxes are thin.

    `boxes (N, 4)` in pixel xyxy, `labels (N,)` class indices, `scores (N,)` or None for ground
    truth, `names` by class index: tensors, arrays or lists. An image whose long side is below
    `min_side` is enlarged to it, so that tags can be read, and a strip gets an empty margin for
    them. In a crowd, lines and tags shrink, then small boxes' tags show the score only, and a tag
    that would hide others is left out; the best scores are placed first.
    """
    # The boxes in the pixels of the canvas, with names that can be written.
    marks = _marks(boxes, labels, scores, names)
    canvas, scale = _enlarged(image.convert("RGB"), min_side)  # convert always copies
    marks = [m for m in (_on_canvas(m, scale, canvas.size) for m in marks) if m is not None]
    font = _font_name(frozenset("".join(m.name for m in marks)))
    marks = [replace(m, name=_writable(m.name, font, f"class {m.label}")) for m in marks]
    # Masks, boxes, tags, and the legend.
    style = _style(marks, canvas.size, font)
    if masks is not None:
        colours = map(colour_of, np.asarray(_host(labels), dtype=np.int64).reshape(-1).tolist())
        outlined = list(zip(masks, colours, strict=True))
        paint_masks(canvas, (image.height, image.width), outlined, math.ceil(style.line / 2))
        style = style._replace(line=1)
    if marks:
        canvas = _wide_enough(canvas)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for mark in sorted(marks, key=lambda m: -_area(m.box)):  # small boxes stay on top of large ones
        _draw_box(draw, mark, style.line)
    for tag in _place(marks, style, canvas.size):
        _draw_tag(draw, tag, style)
    if not legend or not marks:
        return canvas
    return _with_legend(canvas, marks, style.legend_font)


def contact_sheet(
    images: Sequence[Image.Image],
    columns: int | None = None,
    titles: Sequence[str] | None = None,
    *,
    cell: int = 640,
) -> Image.Image:
    """The images in a grid, each fitted into `cell` by `cell` pixels, with a bar above it if there
    are titles.
    """
    if not images:
        return Image.new("RGB", (cell, cell), BACKGROUND)
    assert titles is None or len(titles) == len(images), (
        f"{len(titles or ())} titles for {len(images)} images"
    )
    # The grid: each column is as wide as its widest picture, each row as high as its highest.
    columns = columns or math.ceil(math.sqrt(len(images)))
    pictures = [_fitted(i.convert("RGB"), cell) for i in images]
    bar = max(22, cell // 22) if titles is not None else 0
    rows = [list(range(i, min(i + columns, len(images)))) for i in range(0, len(images), columns)]
    gap = max(4, cell // 80)
    widths = [
        max(picture.width for picture in pictures[column::columns])
        for column in range(len(rows[0]))
    ]
    heights = [bar + max(pictures[i].height for i in row) for row in rows]
    # The sheet, with a gap around each picture.
    size = (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(heights) + 1))
    sheet = Image.new("RGB", size, BACKGROUND)
    for i, picture in enumerate(pictures):
        r, c = divmod(i, columns)
        left, top = sum(widths[:c]) + gap * (c + 1), sum(heights[:r]) + gap * (r + 1)
        if titles is not None:
            sheet.paste(_title(titles[i], (widths[c], bar)), (left, top))
        sheet.paste(picture, (left + (widths[c] - picture.width) // 2, top + bar))
    return sheet


@dataclass(frozen=True)
class _Mark:
    """One box to draw."""

    box: Rectangle
    label: int
    name: str
    score: float | None


class _Style(NamedTuple):
    """How this picture is drawn."""

    line: int  # of the largest boxes
    font: ImageFont.FreeTypeFont
    legend_font: ImageFont.FreeTypeFont
    crowded: bool  # tags show the score only


class _Tag(NamedTuple):
    """A label beside a box."""

    box: Rectangle
    text: str
    label: int


def _marks(boxes: Any, labels: Any, scores: Any, names: Sequence[str] | None) -> list[_Mark]:
    corners = np.asarray(_host(boxes), dtype=np.float64).reshape(-1, 4)
    indices = np.asarray(_host(labels), dtype=np.int64).reshape(-1)
    values = None if scores is None else np.asarray(_host(scores), dtype=np.float64).reshape(-1)
    assert len(indices) == len(corners), f"{len(corners)} boxes and {len(indices)} labels"
    assert values is None or len(values) == len(corners), (
        f"{len(corners)} boxes and {len(values)} scores"
    )
    marks = []
    for i, ((x1, y1, x2, y2), label) in enumerate(
        zip(corners.tolist(), indices.tolist(), strict=True)
    ):
        name = names[label] if names is not None and 0 <= label < len(names) else f"class {label}"
        if math.isfinite(x1 + y1 + x2 + y2):
            marks.append(
                _Mark((x1, y1, x2, y2), label, name, None if values is None else float(values[i]))
            )
    return marks


def _host(values: Any) -> Any:
    """A tensor, wherever it is, as an array; torch itself is not needed here."""
    return values.detach().cpu().float().numpy() if hasattr(values, "detach") else values


def _enlarged(image: Image.Image, min_side: int) -> tuple[Image.Image, float]:
    scale = max(1.0, min_side / max(image.size))
    if scale == 1:
        return image, scale
    return image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    ), scale


def _wide_enough(canvas: Image.Image) -> Image.Image:
    """With room for tags at the right of a strip, and below a flat one."""
    size = (max(canvas.width, NARROWEST), max(canvas.height, NARROWEST))
    if size == canvas.size:
        return canvas
    roomy = Image.new("RGB", size, BACKGROUND)
    roomy.paste(canvas)
    return roomy


def _on_canvas(mark: _Mark, scale: float, size: tuple[int, int]) -> _Mark | None:
    """The mark in the canvas's pixels, cut at its frame; None if it lies outside."""
    width, height = size
    x1, y1, x2, y2 = (v * scale for v in mark.box)
    x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    if x2 < 0 or y2 < 0 or x1 > width or y1 > height:
        return None
    left, right = (min(max(v, 0), width - 1) for v in (x1, x2))
    top, bottom = (min(max(v, 0), height - 1) for v in (y1, y2))
    return _Mark((left, top, right, bottom), mark.label, mark.name, mark.score)


def _style(marks: Sequence[_Mark], size: tuple[int, int], font: str | None) -> _Style:
    """How a picture is drawn: sizes follow the picture's, and the more of it the tags would cover,
    the smaller.
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
    return _Style(line, _font(font, round(height)), _font(font, round(full)), crowded=not fitting)


def _text(mark: _Mark, crowded: bool) -> str:
    name = mark.name if len(mark.name) <= LONGEST else mark.name[: LONGEST - 1] + "…"
    if mark.score is None:
        return "" if crowded else name
    return f"{mark.score:.2f}".removeprefix("0") if crowded else f"{name} {mark.score:.2f}"


def _draw_box(draw: ImageDraw.ImageDraw, mark: _Mark, line: int) -> None:
    x1, y1, x2, y2 = (round(v) for v in mark.box)
    short = min(x2 - x1, y2 - y1)
    line = max(1, min(line, short // 8))
    # Shows on any background
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0, 110))
    if short > 4 * line:
        draw.rectangle((x1 + line, y1 + line, x2 - line, y2 - line), outline=(0, 0, 0, 70))
    draw.rectangle((x1, y1, x2, y2), outline=colour_of(mark.label), width=line)


def _place(marks: Sequence[_Mark], style: _Style, size: tuple[int, int]) -> list[_Tag]:
    """A tag for every mark that has room for one; the best scores choose first."""
    boxes, taken = np.array([m.box for m in marks]).reshape(-1, 4), np.zeros((len(marks), 4))
    placed: list[_Tag] = []
    order = sorted(range(len(marks)), key=lambda i: -(marks[i].score or 0))
    for i in order:
        for text in _texts(marks[i], style):
            tag, hidden = _best_place(marks[i], text, style, size, boxes, taken[: len(placed)])
            if hidden <= 0.1:
                taken[len(placed)] = tag.box
                placed.append(tag)
                break
    return placed


def _texts(mark: _Mark, style: _Style) -> list[str]:
    """What the tag may say, the best first; in a crowd a name stands only where it is short beside
    its box.
    """
    full, brief = _text(mark, False), _text(mark, True)
    roomy = _tag_size(full, style.font)[0] <= 0.6 * (mark.box[2] - mark.box[0])
    return [t for t in ((full, brief) if roomy or not style.crowded else (brief,)) if t]


def _best_place(
    mark: _Mark, text: str, style: _Style, size: tuple[int, int], boxes: Floats, tags: Floats
) -> tuple[_Tag, float]:
    """The tag where it covers least of `boxes (N, 4)` and `tags (M, 4)`, and the fraction of it
    that lies on tags.
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
    return _Tag((x1, y1, x2, y2), text, mark.label), float(hidden[best])


def _overlaps(boxes: Floats, others: Floats) -> Floats:
    """`(M, N)` square pixels in which each of `boxes (M, 4)` and each of `others (N, 4)`
    overlap.
    """
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    area: Floats = (np.minimum(boxes[:, None, 2:], others[:, 2:]) - low).clip(min=0).prod(axis=2)
    return area


def _tag_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    return math.ceil(font.getlength(text) + 0.6 * font.size), math.ceil(1.25 * font.size)


def _draw_tag(draw: ImageDraw.ImageDraw, tag: _Tag, style: _Style) -> None:
    x1, y1, x2, y2 = (round(v) for v in tag.box)
    colour = colour_of(tag.label)
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour)
    draw.text(
        ((x1 + x2) / 2, (y1 + y2) / 2), tag.text, fill=ink_on(colour), font=style.font, anchor="mm"
    )


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever stands out more on `colour` (WCAG's contrast ratio; never below
    4.5).
    """
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (c / 255 for c in colour)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else (255, 255, 255)


def _with_legend(
    canvas: Image.Image, marks: Sequence[_Mark], font: ImageFont.FreeTypeFont
) -> Image.Image:
    """The picture with a strip below it: each class's colour, name and number of boxes."""
    # Where each class stands, in as many lines as they need.
    counts = Counter((m.label, m.name) for m in marks)
    pad, line = round(0.6 * font.size), round(1.7 * font.size)
    entries, x, y = [], pad, pad
    for (label, name), count in sorted(counts.items()):
        text = _shortened(f"{name} ({count})", font, canvas.width - 2 * pad - 1.5 * font.size)
        width = round(1.5 * font.size + font.getlength(text) + 1.2 * font.size)
        if x > pad and x + width > canvas.width:
            x, y = pad, y + line
        entries.append((x, y, label, text))
        x += width
    # The picture, and the classes below it.
    result = Image.new("RGB", (canvas.width, canvas.height + y + line), BACKGROUND)
    result.paste(canvas, (0, 0))
    draw = ImageDraw.Draw(result)
    for x, y, label, text in entries:
        top, side = canvas.height + y, round(font.size)
        draw.rectangle((x, top, x + side, top + side), fill=colour_of(label))
        draw.text((x + 1.5 * font.size, top + side / 2), text, fill=INK, font=font, anchor="lm")
    return result


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _title(text: str, size: tuple[int, int]) -> Image.Image:
    bar = Image.new("RGB", size, BAR)
    name = _font_name(frozenset(text))
    font = _font(name, round(size[1] / 1.8))
    shown = _shortened(_writable(text, name), font, size[0] - font.size)
    ImageDraw.Draw(bar).text((size[0] / 2, size[1] / 2), shown, fill=INK, font=font, anchor="mm")
    return bar


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _area(box: Rectangle) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


@functools.cache
def _font(name: str | None, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


@functools.cache
def _font_name(letters: frozenset[str]) -> str | None:
    """The font that can write most of these letters; None is Pillow's own, the choice for ASCII."""
    if all(c.isascii() for c in letters):
        return None
    return min((None, *FONTS), key=lambda name: len(_missing(name, letters)))


@functools.cache
def _missing(name: str | None, letters: frozenset[str]) -> frozenset[str]:
    """Letters that the font lacks: it draws them as it draws one that no font has. All, if it is
    not installed.
    """
    try:
        font = _font(name, 24)
    except OSError:
        return letters
    nothing = bytes(font.getmask("\U0010ffff"))
    return frozenset(c for c in letters if not c.isspace() and bytes(font.getmask(c)) == nothing)


def _writable(text: str, font: str | None, otherwise: str = "?") -> str:
    """On one line, and in ASCII if the font lacks a letter of it. `otherwise` stands for what ASCII
    cannot say, or two classes could be called the same."""
    text = " ".join(text.split())
    if not _missing(font, frozenset(text)):
        return text or otherwise
    # Letters, without accents
    parts = [c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)]
    plain = " ".join("".join(c for c in parts if c.isascii()).split())
    return plain if all(c.isascii() for c in parts) else f"{otherwise} {plain}".strip()
