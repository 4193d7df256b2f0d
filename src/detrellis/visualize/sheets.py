"""Sheets of pictures: a grid, each with its title."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from detrellis.visualize.colours import BACKGROUND, BAR, INK
from detrellis.visualize.fonts import font_name, font_of, shortened, writable


def contact_sheet(
    images: Sequence[Image.Image],
    columns: int | None = None,
    titles: Sequence[str] | None = None,
    *,
    cell: int = 640,
) -> Image.Image:
    """The images in a grid, each fitted into `cell` by `cell` pixels,
    with a bar above it if there are titles.
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


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _title(text: str, size: tuple[int, int]) -> Image.Image:
    bar = Image.new("RGB", size, BAR)
    name = font_name(frozenset(text))
    font = font_of(name, round(size[1] / 1.8))
    shown = shortened(writable(text, name), font, size[0] - font.size)
    ImageDraw.Draw(bar).text((size[0] / 2, size[1] / 2), shown, fill=INK, font=font, anchor="mm")
    return bar
