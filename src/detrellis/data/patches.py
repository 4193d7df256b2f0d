"""Masks of a picture as patches:
most are much smaller than their picture, and what is not stored is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detrellis.rle import Bitmap, Size

Window = tuple[slice, slice]  # rows, columns


class Patch(NamedTuple):
    """A mask that is `inside` at `(top, left)` of a picture, and empty elsewhere."""

    inside: Bitmap  # (h, w)
    top: int
    left: int

    @property
    def window(self) -> Window:
        """Its place in the picture."""
        height, width = self.inside.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Its place as pixel xyxy."""
        height, width = self.inside.shape
        return self.left, self.top, self.left + width, self.top + height

    def trimmed(self) -> Patch | None:
        """The same mask without empty rows and columns around it; None where it has no pixel."""
        rows, columns = (np.flatnonzero(self.inside.any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            return None
        (top, bottom), (left, right) = (
            (int(seen[0]), int(seen[-1]) + 1) for seen in (rows, columns)
        )
        return Patch(self.inside[top:bottom, left:right], self.top + top, self.left + left)


def boxes_around(patches: Sequence[Patch]) -> Tensor:
    """The places of masks `(n, 4)`, pixel xyxy, float32."""
    return torch.tensor([patch.box for patch in patches], dtype=torch.float32).view(-1, 4)


def whole(patches: Sequence[Patch], size: Size) -> Tensor:
    """The masks in a picture of `size`: `(n, height, width)`, bool."""
    bitmaps = torch.zeros(len(patches), *size, dtype=torch.bool)
    for into, patch in zip(bitmaps.numpy(), patches, strict=True):
        into[patch.window] = patch.inside
    return bitmaps
