"""COCO's compressed run lengths: of a mask's pixels, column by column. hotcoco packs and reads them."""

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
