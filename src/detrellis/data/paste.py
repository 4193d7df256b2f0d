"""Copy-paste by masks (Ghiasi et al., 2021), as Co-DETR has it: objects of another picture of the same size are laid
over one, with hard edges, and what they hide is taken from the masks and boxes below.

| deviation from the released code | why |
| --- | --- |
| an object that is wholly covered is dropped | there a tiny one in the corner stays, with an empty box |
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detrellis.data.lsj import tight_boxes
from detrellis.data.operations import integer

MOST = 99  # objects that are pasted, at most
MOVED = 10  # pixels by which a side of a box may move for the object to stay,
LEFT = 300  # or pixels that it has left, more


class Cutouts(NamedTuple):
    """A picture with its objects and their masks."""

    image: Tensor  # (3, H, W) uint8
    boxes: Tensor  # (n, 4) pixel xyxy
    labels: Tensor  # (n,) int64
    bitmaps: Tensor  # (n, H, W) bool

    def take(self, rows: Tensor) -> Cutouts:
        """The objects of these rows."""
        return Cutouts(self.image, self.boxes[rows], self.labels[rows], self.bitmaps[rows])


def drawn_objects(count: int) -> Tensor:
    """Which of `count` objects are pasted: any number of them, none included."""
    return torch.randperm(count)[: integer(0, min(count, MOST))]


def paste(below: Cutouts, above: Cutouts) -> Cutouts:
    """All objects of `above` on the picture `below`, both of one size; those pasted come last."""
    if not len(above.labels):
        return below
    covered = torch.from_numpy(above.bitmaps.numpy().any(axis=0))
    image = torch.where(covered, above.image, below.image)
    bitmaps = below.bitmaps & ~covered
    boxes = tight_boxes(bitmaps)
    pixels = torch.tensor([np.count_nonzero(mask) for mask in bitmaps.numpy()], dtype=torch.int64)
    kept = ((boxes - below.boxes).abs() <= MOVED).all(dim=1) | (pixels > LEFT)
    kept &= pixels > 0
    return Cutouts(
        image,
        torch.cat([boxes[kept], above.boxes]),
        torch.cat([below.labels[kept], above.labels]),
        torch.cat([bitmaps[kept], above.bitmaps]),
    )


def sampled_grids(bitmaps: Tensor, boxes: Tensor, side: int) -> Tensor:
    """`side` times `side` samples of each mask `(n, H, W)` over its box `(n, 4)`: what lies under their centres."""
    steps = (torch.arange(side) + 0.5) / side
    x, y = (
        (boxes[:, i, None] + steps * (boxes[:, i + 2, None] - boxes[:, i, None])).long().clamp(0, limit - 1)
        for i, limit in ((0, bitmaps.shape[2]), (1, bitmaps.shape[1]))
    )
    return bitmaps[torch.arange(len(boxes))[:, None, None], y[:, :, None], x[:, None, :]]
