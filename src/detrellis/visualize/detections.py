"""Pictures of boxes and masks:
detections or ground truth on an image, with a legend of the classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detrellis.overlay import paint_masks
from detrellis.visualize.colours import BACKGROUND, INK, colour_of, ink_on
from detrellis.visualize.fonts import font_name, shortened, writable
from detrellis.visualize.tags import Mark, Rectangle, Style, Tag, place_tags, style_of

NARROWEST = 160  # pixels of a drawn picture with boxes: a tag's width


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
    """A copy of `image` with its boxes,
    a tag on each (class and score) and a legend of the classes below.

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
    font = font_name(frozenset("".join(m.name for m in marks)))
    marks = [replace(m, name=writable(m.name, font, f"class {m.label}")) for m in marks]
    # Masks, boxes, tags, and the legend.
    style = style_of(marks, canvas.size, font)
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
    for tag in place_tags(marks, style, canvas.size):
        _draw_tag(draw, tag, style)
    if not legend or not marks:
        return canvas
    return _with_legend(canvas, marks, style.legend_font)


def _marks(boxes: Any, labels: Any, scores: Any, names: Sequence[str] | None) -> list[Mark]:
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
                Mark((x1, y1, x2, y2), label, name, None if values is None else float(values[i]))
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


def _on_canvas(mark: Mark, scale: float, size: tuple[int, int]) -> Mark | None:
    """The mark in the canvas's pixels, cut at its frame; None if it lies outside."""
    width, height = size
    x1, y1, x2, y2 = (v * scale for v in mark.box)
    x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    if x2 < 0 or y2 < 0 or x1 > width or y1 > height:
        return None
    left, right = (min(max(v, 0), width - 1) for v in (x1, x2))
    top, bottom = (min(max(v, 0), height - 1) for v in (y1, y2))
    return Mark((left, top, right, bottom), mark.label, mark.name, mark.score)


def _draw_box(draw: ImageDraw.ImageDraw, mark: Mark, line: int) -> None:
    x1, y1, x2, y2 = (round(v) for v in mark.box)
    short = min(x2 - x1, y2 - y1)
    line = max(1, min(line, short // 8))
    # Shows on any background
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0, 110))
    if short > 4 * line:
        draw.rectangle((x1 + line, y1 + line, x2 - line, y2 - line), outline=(0, 0, 0, 70))
    draw.rectangle((x1, y1, x2, y2), outline=colour_of(mark.label), width=line)


def _draw_tag(draw: ImageDraw.ImageDraw, tag: Tag, style: Style) -> None:
    x1, y1, x2, y2 = (round(v) for v in tag.box)
    colour = colour_of(tag.label)
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour)
    draw.text(
        ((x1 + x2) / 2, (y1 + y2) / 2), tag.text, fill=ink_on(colour), font=style.font, anchor="mm"
    )


def _with_legend(
    canvas: Image.Image, marks: Sequence[Mark], font: ImageFont.FreeTypeFont
) -> Image.Image:
    """The picture with a strip below it: each class's colour, name and number of boxes."""
    # Where each class stands, in as many lines as they need.
    counts = Counter((m.label, m.name) for m in marks)
    pad, line = round(0.6 * font.size), round(1.7 * font.size)
    entries, x, y = [], pad, pad
    for (label, name), count in sorted(counts.items()):
        text = shortened(f"{name} ({count})", font, canvas.width - 2 * pad - 1.5 * font.size)
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


def _area(box: Rectangle) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
