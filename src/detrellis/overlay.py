"""Masks on a picture: translucent, each with an outline that shows on any background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from detrellis.rle import area, decode

Colour = tuple[int, int, int]
FILL = 0.42  # of the colour, inside
DARK = 0.55  # of black, around the outline


def paint_masks(canvas: Image.Image, size: tuple[int, int], masks: Sequence[tuple[bytes, Colour]], line: int) -> None:
    """Paints the run lengths of a picture of `size` (height, width), each in its colour, on the enlarged picture.

    Large ones come first, so that small ones lie on them. `line` is the outline's width in the canvas's pixels.
    """
    pixels = np.asarray(canvas).copy()
    areas = [area(runs, size) for runs, _ in masks]
    for number in np.argsort(areas, kind="stable")[::-1].tolist():
        runs, colour = masks[number]
        _paint(pixels, decode(runs, size), np.array(colour), line)
    canvas.paste(Image.fromarray(pixels))


def _paint(pixels: NDArray[np.uint8], mask: NDArray[np.bool_], colour: NDArray[np.int64], line: int) -> None:
    """Paints one mask of the picture, in the part of the canvas that it and its outline reach."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    # The mask in the canvas's pixels, with room for the outline.
    height, width = pixels.shape[:2]
    scale = (height / mask.shape[0], width / mask.shape[1])
    room = line + 2
    top, bottom = max(int(rows[0] * scale[0]) - room, 0), min(int((rows[-1] + 1) * scale[0]) + room, height)
    left, right = max(int(columns[0] * scale[1]) - room, 0), min(int((columns[-1] + 1) * scale[1]) + room, width)
    y = ((np.arange(top, bottom) + 0.5) / scale[0]).astype(int)
    x = ((np.arange(left, right) + 0.5) / scale[1]).astype(int)
    inside = mask[y[:, None], x]
    # Its edge within it, and a darker one around.
    core, around = _shrunk(inside, 2 * line + 1), ~_shrunk(~inside, 3)
    part = pixels[top:bottom, left:right]
    for where, tint, weight in (
        (core, colour, FILL),
        (around & ~inside, np.zeros(3), DARK),
        (inside & ~core, colour, 1.0),
    ):
        part[where] = (part[where] * (1 - weight) + tint * weight).astype(np.uint8)


def _shrunk(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The pixels whose neighbourhood of an odd `width` is in the mask."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    shrunk: NDArray[np.bool_] = np.asarray(image.filter(ImageFilter.MinFilter(width))) > 0
    return shrunk
