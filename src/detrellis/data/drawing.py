"""Masks drawn after the augmentation, from the outlines of the objects:
no bitmap is kept or resampled.

Each picture goes through the transform with five points in front of its boxes (`operations.py`):
three that tell the affine map from its pixels to those of the result, and two that tell what of it
is left. A mosaic, a blend or a picture with others' objects is several such groups, one after the
other.

hotcoco draws polygons; they agree with run lengths to a pixel or two at the edge.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrellis.data.operations import CORNER, EDGE, PASTED, Picture
from detrellis.data.patches import Patch
from detrellis.rle import Bitmap, Size, bounds, decode

# Polygons (x1, y1, x2, ...) of its parts; or COCO's compressed run lengths
Outline = list[NDArray[np.float32]] | bytes
Floats = NDArray[np.float64]
POINTS = 5  # of a picture
REACH = 1024.0  # pixels between the points that tell the map


class Affine(NamedTuple):
    """A map of the plane: `points @ matrix.T + offset`."""

    matrix: Floats  # (2, 2)
    offset: Floats  # (2,)

    def __call__(self, points: Floats) -> Floats:
        """Points `(..., 2)` where they go."""
        moved: Floats = points @ self.matrix.T + self.offset
        return moved

    @property
    def straight(self) -> bool:
        """Whether rows stay rows and columns stay columns."""
        return not (self.matrix[0, 1] or self.matrix[1, 0])

    def then(self, other: Affine) -> Affine:
        """This one followed by the other."""
        return Affine(other.matrix @ self.matrix, other(self.offset))

    def inverse(self) -> Affine:
        """The map back."""
        back: Floats = np.linalg.inv(self.matrix).astype(np.float64)
        return Affine(back, -back @ self.offset)


class Part(NamedTuple):
    """What became of one picture in the result, and the rows of its objects there."""

    affine: Affine  # from its pixels to those of the result
    window: Floats  # (4,) x1, y1, x2, y2 of what is left of it, in its pixels
    pasted: bool  # whether it hides the objects of the parts before it
    rows: tuple[int, ...]


class Object(NamedTuple):
    """An outline with what it is seen through and what lies on it."""

    outline: Outline
    size: Size  # of the picture that it is in
    part: Part
    above: tuple[Part, ...]


def pointed(image: Tensor, boxes: Tensor, rows: Tensor) -> Picture:
    """A picture with its points in front of the boxes; `rows (n,)` stand for the labels."""
    height, width = image.shape[1:]
    places = boxes.new_tensor([[0, 0], [REACH, 0], [0, REACH], [0, 0], [width, height]])
    return (
        image,
        torch.cat([places.repeat(1, 2), boxes]),
        torch.cat([rows.new_tensor([CORNER] * 3 + [EDGE] * 2), rows]),
    )


def framed_object(
    points: Tensor, box: Tensor, row: Tensor, window: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """The boxes and labels of one object that is cut out of its picture with `window` and pasted
    into another one.
    """
    x1, y1, x2, y2 = window
    edges = points.new_tensor([[x1, y1, x1, y1], [x2, y2, x2, y2]])
    labels = row.new_tensor([PASTED] * 3 + [EDGE] * 2)
    return torch.cat([points[:3], edges, box]), torch.cat([labels, row])


def parts_of(boxes: Tensor, labels: Tensor) -> list[Part]:
    """The parts of a transformed picture, in order."""
    points = (labels < 0).nonzero().squeeze(1).tolist()
    starts = points[::POINTS]
    parts = []
    for start, end in itertools.pairwise([*starts, len(labels)]):
        places: Floats = boxes[start : start + POINTS, :2].double().numpy()
        origin, right, below, *edges = places
        affine = Affine(np.stack([right - origin, below - origin], axis=1) / REACH, origin)
        corners = affine.inverse()(np.stack(edges))
        window = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
        parts.append(
            Part(affine, window, int(labels[start]) == PASTED, tuple(range(start + POINTS, end)))
        )
    return parts


def above(parts: Sequence[Part], number: int) -> tuple[Part, ...]:
    """The parts that were pasted onto this one:
    those that follow it up to the next whole picture.
    """
    return tuple(itertools.takewhile(lambda part: part.pasted, parts[number + 1 :]))


def draw(shown: Object, view: Affine, size: Size) -> Patch | None:
    """The pixels of an object where it is seen, in a picture of `size`; None where it has none.

    `view` maps the result's pixels to that picture's. Only the part that the object can reach is
    looked at.
    """
    left, top, right, bottom = _reach(shown, shown.part.affine.then(view), size)
    if left >= right or top >= bottom:
        return None
    view = view.then(Affine(np.eye(2), np.array([-left, -top], dtype=np.float64)))
    affine, size = shown.part.affine.then(view), (bottom - top, right - left)
    seen: Bitmap = _outlined(shown.outline, affine, size, shown.size)
    _cut(seen, shown.part.window, affine)
    for part in shown.above:
        seen[_within(part.window, part.affine.then(view), size)] = False
    return Patch(seen, top, left).trimmed()


def _reach(shown: Object, affine: Affine, size: Size) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels that an object's outline and its picture's window
    reach.
    """
    low, high = np.zeros(2), np.array(size[::-1], dtype=np.float64)
    x1, y1, x2, y2 = shown.part.window
    outlines = [np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])]
    if isinstance(shown.outline, bytes):
        x, y, width, height = bounds(shown.outline, shown.size)
        right, bottom = x + width, y + height
        outlines.append(np.array([[x, y], [right, y], [right, bottom], [x, bottom]]))
    else:
        outlines.append(
            np.concatenate([part.reshape(-1, 2) for part in shown.outline]).astype(np.float64)
        )
    for points in outlines:
        moved = affine(points)
        low = np.maximum(low, np.floor(moved.min(axis=0)) - 1)
        high = np.minimum(high, np.ceil(moved.max(axis=0)) + 1)
    (left, top), (right, bottom) = low.astype(int).tolist(), high.astype(int).tolist()
    return left, top, right, bottom


def _outlined(outline: Outline, affine: Affine, size: Size, picture: Size) -> Bitmap:
    if isinstance(outline, bytes):
        return _resampled(decode(outline, picture), affine, size)
    return _filled([affine(part.reshape(-1, 2).astype(np.float64)) for part in outline], size)


def _filled(polygons: Sequence[Floats], size: Size) -> Bitmap:
    """Pixels in any of the polygons `(n, 2)`."""
    from hotcoco import mask

    drawn = mask.decode(mask.frPyObjects([polygon.ravel().tolist() for polygon in polygons], *size))
    inside: Bitmap = np.asarray(drawn.any(axis=2))
    return inside


def _resampled(bitmap: Bitmap, affine: Affine, size: Size) -> Bitmap:
    """A bitmap where `affine` takes it: each pixel is what lies under its centre."""
    x, y = (np.arange(side) + 0.5 for side in reversed(size))
    back = affine.inverse()
    height, width = bitmap.shape
    if affine.straight:  # all pixels of a column come from one column, and so do those of a row
        column, row = (
            np.floor(places * back.matrix[axis, axis] + back.offset[axis]).astype(int)
            for axis, places in enumerate((x, y))
        )
        seen = bitmap[:, column.clip(0, width - 1)][row.clip(0, height - 1)]
        row = row[:, None]
    else:
        places = np.floor(back(np.stack(np.meshgrid(x, y), axis=-1))).astype(int)
        column, row = places[..., 0], places[..., 1]
        seen = bitmap[row.clip(0, height - 1), column.clip(0, width - 1)]
    known = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    inside: Bitmap = seen & known
    return inside


def _within(window: Floats, affine: Affine, size: Size) -> Bitmap:
    """Pixels whose centre is in a window."""
    inside = np.ones(size, dtype=np.bool_)
    _cut(inside, window, affine)
    return inside


def _cut(mask: Bitmap, window: Floats, affine: Affine) -> None:
    """Empties a mask where a pixel's centre is not in a window."""
    x1, y1, x2, y2 = window
    corners = affine(np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]))
    if not affine.straight:
        mask &= _filled([corners], mask.shape)
        return
    (left, top), (right, bottom) = (
        np.ceil(c - 0.5).astype(int).clip(min=0) for c in (corners.min(axis=0), corners.max(axis=0))
    )
    for outside in (mask[:top], mask[bottom:], mask[:, :left], mask[:, right:]):
        outside[:] = False


def patches(objects: Sequence[Object], size: Size) -> list[Patch | None]:
    """The mask of each object in the whole result; None where nothing is seen of it."""
    same = Affine(np.eye(2), np.zeros(2))
    return [draw(each, same, size) for each in objects]


def grids(objects: Sequence[Object], boxes: Tensor, side: int) -> Tensor:
    """The masks of the objects, each over its box in the result:
    `(n, side, side)` samples, bool.
    """
    drawn = torch.zeros(len(objects), side, side, dtype=torch.bool)
    for mask, each, box in zip(drawn, objects, boxes.double().numpy(), strict=True):
        scale = side / (box[2:] - box[:2])
        view = Affine(np.diag(scale), -box[:2] * scale)
        if (patch := draw(each, view, (side, side))) is not None:
            mask.numpy()[patch.window] = patch.inside
    return drawn
