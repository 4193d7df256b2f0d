"""Masks of objects, for the schemes that learn from them: square grids of samples, each over the box of its object.

A grid knows nothing of the image's size, so a resize does not change it. The masks stay outlines (COCO's
`segmentation`) until the picture has been augmented. Only then are they drawn, each in the part of the picture that its
box still shows: no bitmap is kept or resampled. Where that part is tell two corners that go through the transform with
the boxes (`operations.CORNER`).

hotcoco draws; its polygons agree with run lengths to a sample or two at the edge.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrellis.data.annotations import Annotations
from detrellis.data.files import not_collecting
from detrellis.data.formats.coco import load_json
from detrellis.data.formats.segmentation import packed
from detrellis.data.operations import CORNER, Picture
from detrellis.errors import UserError

SIDE = 112  # samples along each side of a box: four times the 28 that mask heads predict
REMEDY = (
    "Supply a COCO file in which each object has a `segmentation` (polygons, or run lengths of the image's size), or "
    "train without masks: take the branch `rcnn` instead of `mask`."
)
Outline = list[NDArray[np.float32]] | bytes  # polygons (x1, y1, x2, ...) of its parts; or COCO's compressed run lengths


@dataclass(frozen=True)
class Outlines:
    """The outlines of `T` objects in flat arrays (see `annotations.py`)."""

    data: NDArray[np.uint8]  # (bytes,) the polygons of all parts, or their run lengths, one after the other
    parts: NDArray[np.int64]  # (P + 1,) first byte of each part
    starts: NDArray[np.int64]  # (T + 1,) first part of each object
    polygons: NDArray[np.bool_]  # (T,) which of the two; an object of run lengths is one part

    def __getitem__(self, row: int) -> Outline:
        bounds = self.parts[self.starts[row] : self.starts[row + 1] + 1]
        parts = [self.data[start:end] for start, end in itertools.pairwise(bounds)]
        return [part.view(np.float32) for part in parts] if self.polygons[row] else parts[0].tobytes()


def read_outlines(annotations: Annotations) -> Outlines:
    """The outlines of all objects but crowd regions, from the COCO file that lists them; it is read again for this.

    Raises `UserError` where one is missing or damaged.
    """
    file, lines = annotations.source, annotations.lines
    if file is None or lines is None:
        raise UserError(f"{file or annotations.root}: this data set has boxes without masks", REMEDY)
    kept = ~annotations.crowd
    frames = annotations.sizes[annotations.box_rows[kept]].tolist()
    rows = load_json(file)["annotations"]
    with not_collecting():
        values = [rows[line].get("segmentation") for line in lines[kept].tolist()]
        objects = [packed(value, size) for value, size in zip(values, frames, strict=True)]
    if missing := [row for row, parts in enumerate(objects) if not parts]:
        first = f"annotation {annotations.ids[kept][missing[0]]}"
        raise UserError(f"{file}: {first} has no mask, or none that can be read ({len(missing)} such)", REMEDY)
    parts = list(itertools.chain.from_iterable(objects))
    polygons = np.array([isinstance(value, list) for value in values], dtype=np.bool_)
    return Outlines(np.frombuffer(b"".join(parts), dtype=np.uint8), _starts(parts), _starts(objects), polygons)


def _starts(pieces: Sequence[Sized]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, pieces)])


def transform_with_masks(
    transform: Callable[[Tensor, Tensor, Tensor], Picture],
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    outlines: Sequence[Outline],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, boxes and labels as `transform` leaves them, with the same random numbers as without masks; and the masks
    `(n, SIDE, SIDE)` of the boxes that are left."""
    height, width = image.shape[1:]
    corners = boxes.new_tensor([[0, 0, 0, 0], [width, height, width, height]])
    rows = torch.cat([labels.new_full((2,), CORNER), torch.arange(len(labels))])
    image, boxes, rows = transform(image, torch.cat([corners, boxes]), rows)
    (first, last), boxes, rows = boxes[:2].double(), boxes[2:], rows[2:]
    visible = (boxes - first) / (last - first) * corners[1]  # edges in the picture as it was; a flip exchanges them
    masks = torch.zeros(len(rows), SIDE, SIDE, dtype=torch.bool)
    for mask, row, edges in zip(masks, rows.tolist(), visible.tolist(), strict=True):
        mask.copy_(torch.from_numpy(draw(outlines[row], edges, (height, width))))
    return image, boxes, labels[rows], masks


def draw(outline: Outline, edges: Sequence[float], size: tuple[int, int]) -> NDArray[np.uint8]:
    """`(SIDE, SIDE)` samples, 1 inside of the outline, of the box with these edges (x1, y1, x2, y2 in pixels) in an
    image of `size` (height, width). With x1 > x2 or y1 > y2 it is seen in a mirror."""
    from hotcoco import mask

    start, end = np.array(edges[:2]), np.array(edges[2:])
    if isinstance(outline, bytes):
        places = start + (np.arange(SIDE)[:, None] + 0.5) / SIDE * (end - start)
        columns, rows = places.astype(np.intp).clip(0, [size[1] - 1, size[0] - 1]).T
        inside: NDArray[np.uint8] = mask.decode({"size": size, "counts": outline})[np.ix_(rows, columns)]
        return inside
    scaled = [((part.reshape(-1, 2) - start) / (end - start) * SIDE).ravel().tolist() for part in outline]
    inside = mask.decode(mask.frPyObjects(scaled, SIDE, SIDE)).max(axis=2)  # of any part
    return inside
