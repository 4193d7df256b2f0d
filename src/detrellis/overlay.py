"""Masks on a picture: translucent, each with an outline that shows on any background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from detrellis.rle import Bitmap, area, decode

Colour = tuple[int, int, int]
FILL = 0.42  # of the colour, inside
DARK = 0.55  # of black, around the outline
AROUND = 1  # pixels of black


def paint_masks(
    canvas: Image.Image, size: tuple[int, int], masks: Sequence[tuple[bytes, Colour]], line: int
) -> None:
    """Paints the run lengths of a picture of `size` (height, width),
    each in its colour, on the enlarged picture.

    Large ones come first, so that small ones lie on them. `line` is the outline's width in the
    canvas's pixels.
    """
    areas = [area(runs, size) for runs, _ in masks]
    for number in np.argsort(areas, kind="stable")[::-1].tolist():
        runs, colour = masks[number]
        _paint(canvas, decode(runs, size), colour, line)


def _paint(canvas: Image.Image, mask: Bitmap, colour: Colour, line: int) -> None:
    """Paints one mask of the picture, in the part of the canvas that it and its outline reach."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    # The mask in the canvas's pixels, with room for the outline.
    scale = (canvas.height / mask.shape[0], canvas.width / mask.shape[1])
    top, bottom = (round(edge * scale[0]) for edge in (rows[0], rows[-1] + 1))
    left, right = (round(edge * scale[1]) for edge in (columns[0], columns[-1] + 1))
    y = ((np.arange(top, bottom) + 0.5) / scale[0]).astype(int)
    x = ((np.arange(left, right) + 0.5) / scale[1]).astype(int)
    room = line + AROUND
    inside = np.pad(mask[y[:, None], x], room)
    # Its edge within it, and a darker one around.
    core, around = _shrunk(inside, line), ~_shrunk(~inside, AROUND)
    for where, tint, weight in (
        (core, colour, FILL),
        (around & ~inside, (0, 0, 0), DARK),
        (inside & ~core, colour, 1),
    ):
        opacity = Image.fromarray(where.astype(np.uint8) * round(255 * weight))
        canvas.paste(tint, (left - room, top - room), opacity)


def _shrunk(mask: Bitmap, by: int) -> Bitmap:
    """The pixels of which no neighbour up to `by` pixels away,
    along both axes, is outside the mask.
    """
    done = 0
    while done < by:
        # So far every pixel knows of its neighbours up to `done` away
        step = min(2 * done + 1, by - done)
        mask = _both_ways(_both_ways(mask, step).T, step).T
        done += step
    return mask


def _both_ways(mask: Bitmap, step: int) -> Bitmap:
    """The pixels that are in the mask like those `step` rows above and below,
    or those of the first and last row.
    """
    shrunk = mask.copy()
    shrunk[step:] &= mask[:-step]
    shrunk[:-step] &= mask[step:]
    shrunk[:step] &= mask[:1]
    shrunk[-step:] &= mask[-1:]
    return shrunk
