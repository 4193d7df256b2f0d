"""Tiles: a large picture in overlapping parts, so that its small objects are seen larger, as SAHI
does it (Akyon et al. 2022, arXiv:2202.06934).

Each tile goes through the detector as a picture of its own, and the whole picture as one more view,
in which objects are whole that no tile holds. What the views give is put together by greedy NMS
within each class, with two deviations from SAHI's:

* A detection drops those of other views only: within one view a DETR gives each object once, also
  where they overlap.
* A box that ends at an inner border of its tile is a part of an object, most likely. It counts half
  when it is decided which of two stays, and is dropped where most of it lies in a better one: the
  IoU of a part with the whole is small. SAHI takes that overlap for all boxes, which loses small
  objects before large ones of their class. Parts are not joined: an object that is larger than the
  overlap needs the whole picture, or larger tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrellis.data.annotations import Annotations
from detrellis.data.decode import read_image
from detrellis.distributed import World
from detrellis.engine.coco_backend import Masks
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.console import track
from detrellis.engine.evaluate import completed
from detrellis.errors import UserError
from detrellis.rle import placed
from detrellis.types import Detections

Floats = NDArray[np.float64]
IOU = 0.5  # of boxes of two views that are of one object
INSIDE = 0.5  # of a part that lies in a better box
CUT = 0.01  # of a tile's side: a box that ends so near to its border is cut by it
HALF = 0.5  # factor of a part's score, when it is decided which of two stays
MOST = 4000  # best detections of a picture that are compared


class Window(NamedTuple):
    """A part of a picture, in its pixels."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut: tiles of `size` pixels a side,
    which share `overlap` of it with the next one.
    """

    size: int
    overlap: float = 0.2
    full: bool = True  # the whole picture is one more view

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 65536:
            raise UserError(
                f"tiles of {self.size} pixels", "Take a side from 32 to 65536, such as 640."
            )
        if not 0 <= self.overlap <= 0.9:
            raise UserError(
                f"tiles that overlap by {self.overlap:g}",
                "Take a share from 0 to 0.9 of their side.",
            )

    def windows(self, height: int, width: int) -> list[Window]:
        """The tiles of a picture, row by row, all of one size, then the whole.
        One that fits into a tile is one.
        """
        tiles = [
            Window(left, top, min(left + self.size, width), min(top + self.size, height))
            for top in self._starts(height)
            for left in self._starts(width)
        ]
        whole = Window(0, 0, width, height)
        return [*tiles, whole] if self.full and tiles != [whole] else tiles

    def _starts(self, side: int) -> list[int]:
        """Where tiles begin; the last one ends with the picture."""
        last = max(side - self.size, 0)
        step = max(round(self.size * (1 - self.overlap)), 1)
        return [*range(0, last, step), last]


def one_way(tta: bool | str) -> None:
    """Raises `UserError` where the views of test-time augmentation are asked for, beside tiles."""
    if tta is not False:
        raise UserError("--tiles and --tta are both views of a picture", "Leave one of them out.")


def merged(
    of_tiles: Sequence[tuple[Window, Detections]],
    size: tuple[int, int],
    threshold: float,
    k: int | None = None,
) -> Detections:
    """The detections of a picture of `size` (height, width), of those in its windows;
    at most `k`, best first.

    `threshold` is the IoU from which two are of one object. Masks are carried along, and placed in
    the picture.
    """
    boxes = torch.cat([part.boxes + torch.tensor([*window[:2]] * 2) for window, part in of_tiles])
    scores, labels = (
        torch.cat([getattr(part, name) for _, part in of_tiles]) for name in ("scores", "labels")
    )
    views = torch.cat([torch.full((len(part.scores),), i) for i, (_, part) in enumerate(of_tiles)])
    cut = torch.cat([_cut(part.boxes, window, size) for window, part in of_tiles])
    order = (scores * torch.where(cut, HALF, 1.0)).argsort(descending=True, stable=True)[:MOST]
    columns = (
        boxes[order].double().numpy(),
        labels[order].numpy(),
        views[order].numpy(),
        cut[order].numpy(),
    )
    kept = order[_apart(*columns, threshold)]
    kept = kept[scores[kept].argsort(descending=True, stable=True)][:k]
    masks = None
    if of_tiles[0][1].masks is not None:
        runs = [(run, window) for window, part in of_tiles for run in part.masks or ()]
        masks = tuple(_placed(runs[i], size) for i in kept.tolist())
    return Detections(scores[kept], labels[kept], boxes[kept], masks)


def _placed(drawn: tuple[bytes, Window], size: tuple[int, int]) -> bytes:
    """A window's mask as one of the whole picture."""
    run, window = drawn
    left, top, right, bottom = window
    return placed(run, (bottom - top, right - left), (top, left), size)


def _cut(boxes: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """Whether each box `(n, 4)` of a window ends at a border of it that is none of the
    picture's.
    """
    left, top, right, bottom = window
    height, width = size
    room = torch.tensor([right - left, bottom - top]) * CUT
    inner = torch.tensor([left > 0, top > 0, right < width, bottom < height])
    at = torch.cat(
        [boxes[:, :2] <= room, boxes[:, 2:] >= torch.tensor([right - left, bottom - top]) - room],
        dim=1,
    )
    return (at & inner).any(dim=1)


def _apart(
    boxes: Floats,
    labels: NDArray[np.int64],
    views: NDArray[np.int64],
    cut: NDArray[np.bool_],
    threshold: float,
) -> NDArray[np.int64]:
    """The rows that stay, of detections in the order in which they are taken;
    a row at a time, so that memory stays small."""
    left = np.ones(len(boxes), dtype=np.bool_)
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)
    for row in range(len(boxes)):
        if not left[row]:
            continue
        rest = slice(row + 1, None)
        low = np.maximum(boxes[row, :2], boxes[rest, :2])
        high = np.minimum(boxes[row, 2:], boxes[rest, 2:])
        both = (high - low).clip(min=0).prod(axis=1)
        same = both > threshold * (areas[row] + areas[rest] - both)
        part = cut[rest] & (both > INSIDE * areas[rest])
        left[rest] &= ~((same | part) & (labels[rest] == labels[row]) & (views[rest] != views[row]))
    return np.flatnonzero(left)


def collect_tiles(
    detect: Callable[[Tensor], Detections],
    annotations: Annotations,
    world: World,
    truth: Masks | None = None,
    progress: bool = False,
) -> CocoEvaluator:
    """As `engine.evaluate.collect`, of all that `detect` gives of each whole image, as `predict`
    does: many tiles hold more than a detector's `top_k`. With `truth`, the masks of the
    annotations, it has to give masks."""
    evaluator = CocoEvaluator(annotations, top_k=MOST, truth=truth)
    rows = range(world.rank, len(annotations), world.size)
    for row in track(rows, "evaluate tiles", len(rows), progress):
        height, width = annotations.sizes[row].tolist()
        detections = detect(read_image(annotations.path(row), (height, width)))
        if truth is not None and detections.masks is None:
            raise UserError(
                "the detector gives boxes without masks", "Evaluate its boxes: --metric coco."
            )
        evaluator.update([int(annotations.image_ids[row])], [detections])
    return completed(evaluator)
