"""COCO's compressed run lengths:
of a mask's pixels, column by column. hotcoco packs and reads them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bitmap = NDArray[np.bool_]  # (height, width)
Size = tuple[int, int]  # height, width


def encode(mask: Bitmap) -> bytes:
    """The run lengths of a bitmap."""
    from hotcoco import mask as coco

    counts: bytes = coco.encode(mask)["counts"]
    return counts


def decode(runs: bytes, size: Size) -> Bitmap:
    """The bitmap of these run lengths in an image of `size`."""
    from hotcoco import mask as coco

    pixels: NDArray[np.uint8] = coco.decode({"size": [*size], "counts": runs})
    return pixels.astype(np.bool_)


def area(runs: bytes, size: Size) -> int:
    """The pixels inside."""
    from hotcoco import mask as coco

    return int(coco.area({"size": [*size], "counts": runs}))


def bounds(runs: bytes, size: Size) -> tuple[float, float, float, float]:
    """Left, top, width and height of a box with all pixels inside; of no pixel, all zero."""
    from hotcoco import mask as coco

    x, y, width, height = coco.toBbox({"size": [*size], "counts": runs})
    return x, y, width, height


def polygons(mask: Bitmap) -> list[list[float]]:
    """The outlines of a bitmap along its pixels' edges,
    COCO's polygons (x1, y1, x2, y2, ...); holes are filled.

    Parts that touch at a corner only are polygons of their own.
    """
    following = _edges(np.pad(mask, 1))
    outlines = []
    while following:
        start = place = next(iter(following))
        corners, direction = [], (0, 0)
        while True:
            steps = following[place]
            # At a crossing, back to itself
            step = max(steps, key=lambda s: direction[0] * s[1] - direction[1] * s[0])
            steps.remove(step)
            if not steps:
                del following[place]
            if step != direction:
                corners.append(place)
            place, direction = (place[0] + step[0], place[1] + step[1]), step
            if place == start:
                break
        ring = np.array(corners, dtype=np.float64)
        x, y = ring.T
        if (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0:  # a hole runs the other way
            outlines.append(ring.ravel().tolist())
    return outlines


def _edges(padded: Bitmap) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """The steps along the edges of the bitmap's pixels from each corner (x, y),
    with the pixel on the right hand.
    """
    inner = padded[1:-1, 1:-1]
    sides = (
        (~padded[:-2, 1:-1], (0, 0), (1, 0)),  # upper edges run to the right
        (~padded[1:-1, 2:], (1, 0), (0, 1)),
        (~padded[2:, 1:-1], (1, 1), (-1, 0)),
        (~padded[1:-1, :-2], (0, 1), (0, -1)),
    )
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for outside, (dx, dy), step in sides:
        for y, x in np.argwhere(inner & outside).tolist():
            steps.setdefault((x + dx, y + dy), []).append(step)
    return steps


def simplified(outline: list[float], tolerance: float) -> list[float]:
    """A polygon (x1, y1, x2, y2, ...) without the corners that lie within `tolerance` pixels of its
    simpler form (Ramer 1972, Douglas and Peucker 1973)."""
    ring = np.array(outline, dtype=np.float64).reshape(-1, 2)
    closed = np.concatenate([ring, ring[:1]])
    farthest = int(np.linalg.norm(ring - ring[0], axis=1).argmax())
    kept, parts = {0, farthest}, [(0, farthest), (farthest, len(ring))]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        chord, between = closed[last] - closed[first], closed[first + 1 : last] - closed[first]
        distance = np.abs(chord[0] * between[:, 1] - chord[1] * between[:, 0]) / max(
            float(np.linalg.norm(chord)), 1e-9
        )
        if distance.max() > tolerance:
            place = first + 1 + int(distance.argmax())
            kept.add(place)
            parts += [(first, place), (place, last)]
    return ring[sorted(kept)].ravel().tolist() if len(kept) > 2 else outline


def placed(runs: bytes, size: Size, corner: tuple[int, int], whole: Size) -> bytes:
    """The run lengths of a mask in an image of `size` as those of a `whole` image, in which its
    upper left corner is at `corner` (row, column). No bitmap of the whole is made."""
    from hotcoco import mask as coco

    # (width, height + 1)
    edges = np.diff(np.pad(decode(runs, size).T.astype(np.int8), ((0, 0), (1, 1))))
    starts, ends = (
        (columns + corner[1]) * whole[0] + rows + corner[0]
        for columns, rows in (np.nonzero(edges == 1), np.nonzero(edges == -1))
    )
    # A run that reaches the image's lower edge may go on at the top of the next column.
    apart = starts[1:] != ends[:-1]
    first, last = np.append(True, apart)[: len(starts)], np.append(apart, True)[: len(ends)]
    changes = np.stack([starts[first], ends[last]], axis=1).ravel()
    counts = np.diff(changes, prepend=0, append=whole[0] * whole[1]).tolist()
    if len(counts) > 1 and not counts[-1]:  # the mask holds the last pixel
        counts.pop()
    packed: bytes = coco.frPyObjects({"size": [*whole], "counts": counts}, *whole)["counts"]
    return packed
