"""The outlines of a data set's objects,
for what learns from masks, and the masks of an augmented picture.

They stay outlines (COCO's `segmentation`) until then (`drawing.py`). There are two kinds of masks:
bitmaps of the whole picture, and square grids of samples, each over the box of its object, which
know nothing of the picture's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrellis.data.annotations import Annotations
from detrellis.data.drawing import Object, Outline, above, grids, parts_of, patches
from detrellis.data.files import not_collecting
from detrellis.data.formats.segmentation import drawn, packed
from detrellis.data.patches import Patch
from detrellis.errors import UserError

SIDE = 112  # samples along each side of a box: four times the 28 that mask heads predict
REMEDY = (
    "`detrellis check` lists all such. Supply annotations in which each object has an outline "
    "(in COCO a `segmentation`: polygons, or run lengths of the image's size), or train without "
    "masks: -o detector.masks=null -o data.masks=false, with augment=lsj -o data.copy_paste=0, and "
    "of scheme co the branch `rcnn` instead of `mask`."
)


@dataclass(frozen=True)
class Outlines:
    """The outlines of `T` objects in flat arrays (see `annotations.py`)."""

    # (bytes,) the polygons of all parts, or their run lengths, one after the other
    data: NDArray[np.uint8]
    parts: NDArray[np.int64]  # (P + 1,) first byte of each part
    starts: NDArray[np.int64]  # (T + 1,) first part of each object
    polygons: NDArray[np.bool_]  # (T,) which of the two; an object of run lengths is one part

    def __getitem__(self, row: int) -> Outline:
        bounds = self.parts[self.starts[row] : self.starts[row + 1] + 1]
        parts = [self.data[start:end] for start, end in itertools.pairwise(bounds)]
        return (
            [part.view(np.float32) for part in parts] if self.polygons[row] else parts[0].tobytes()
        )


def segmentations(annotations: Annotations) -> list[Any]:
    """COCO's `segmentation` of each object, as the files have it.
    Raises `UserError` where the set has boxes only.
    """
    a = annotations
    if a.segmentations is None or a.lines is None:
        raise UserError(f"{a.source or a.root}: this data set has boxes without masks", REMEDY)
    return a.segmentations(a.image_ids[a.box_rows].tolist(), a.lines.tolist())


def _missing(annotations: Annotations, rows: Sequence[int]) -> UserError:
    first = (
        f"annotation {annotations.ids[rows[0]]} in "
        f"{annotations.path(int(annotations.box_rows[rows[0]])).name}"
    )
    what = f"{annotations.source}: {first} has no mask, or none that can be read ({len(rows)} such)"
    return UserError(what, REMEDY)


def read_outlines(annotations: Annotations) -> Outlines:
    """The outlines of all objects but crowd regions;
    the files that list them are read again for this.

    Raises `UserError` where one is missing or damaged.
    """
    kept = ~annotations.crowd
    frames = annotations.sizes[annotations.box_rows[kept]].tolist()
    with not_collecting():
        values = list(itertools.compress(segmentations(annotations), kept.tolist()))
        objects = [packed(value, size) for value, size in zip(values, frames, strict=True)]
    if missing := [
        row for row, parts in zip(np.flatnonzero(kept).tolist(), objects, strict=True) if not parts
    ]:
        raise _missing(annotations, missing)
    parts = list(itertools.chain.from_iterable(objects))
    polygons = np.array([isinstance(value, list) for value in values], dtype=np.bool_)
    return Outlines(
        np.frombuffer(b"".join(parts), dtype=np.uint8), _starts(parts), _starts(objects), polygons
    )


def has_outlines(annotations: Annotations) -> bool:
    """Whether every object has an outline that can be read."""
    try:
        read_outlines(annotations)
    except UserError:
        return False
    return True


def run_lengths(annotations: Annotations) -> list[dict[str, Any]]:
    """COCO's compressed run lengths (`size`, `counts`) of each object in its image,
    as evaluation takes them.

    Polygons are drawn as pycocotools draws them. A crowd region without a mask has an empty one;
    raises `UserError` where an object has none.
    """
    masks = []
    rows = zip(
        segmentations(annotations), annotations.sizes[annotations.box_rows].tolist(), strict=True
    )
    for row, (value, size) in enumerate(rows):
        run = drawn(value, size)
        if run is None and not annotations.crowd[row]:
            raise _missing(annotations, [row])
        masks.append({"size": size, "counts": b"" if run is None else run})
    return masks


class MaskReader:
    """Draws the masks of augmented pictures; which of the two kinds, the data set's user says."""

    def __init__(self, annotations: Annotations, *, grids: bool, bitmaps: bool) -> None:
        kept = ~annotations.crowd
        self.outlines, self.grids, self.bitmaps = read_outlines(annotations), grids, bitmaps
        # (T, 2) of each object's picture
        self.sizes = annotations.sizes[annotations.box_rows[kept]].astype(np.int32)

    def __call__(self, image: Tensor, boxes: Tensor, rows: Tensor) -> Drawn:
        """The objects that are left of a picture that was `pointed`.
        With bitmaps, those without a pixel are not.
        """
        objects = self._objects(boxes, rows)
        boxes, rows = boxes[rows >= 0], rows[rows >= 0]
        seen = None
        if self.bitmaps:
            masks = patches(objects, (image.shape[1], image.shape[2]))
            left = torch.tensor([mask is not None for mask in masks], dtype=torch.bool)
            boxes = boxes[left]
            rows = rows[left]
            objects = list(itertools.compress(objects, left.tolist()))
            seen = [mask for mask in masks if mask is not None]
        return Drawn(boxes, rows, grids(objects, boxes, SIDE) if self.grids else None, seen)

    def _objects(self, boxes: Tensor, rows: Tensor) -> list[Object]:
        parts, objects = parts_of(boxes, rows), []
        for number, part in enumerate(parts):
            covers = above(parts, number)
            for row in (int(rows[place]) for place in part.rows):
                height, width = self.sizes[row].tolist()
                objects.append(Object(self.outlines[row], (height, width), part, covers))
        return objects


class Drawn(NamedTuple):
    """The objects of an augmented picture with their masks."""

    boxes: Tensor  # (n, 4)
    rows: Tensor  # (n,) of the data set's objects
    grids: Tensor | None  # (n, SIDE, SIDE) bool
    patches: list[Patch] | None  # n, of the whole picture


def _starts(pieces: Sequence[Sized]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, pieces)])
