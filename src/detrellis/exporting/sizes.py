"""Sizes of maps as short formulas of the picture's, while a network is traced for any size."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def short_sizes() -> Iterator[None]:
    """Let timm's "same" padding (EfficientNet) say what it adds in whole numbers, without a maximum.

    With its own formula, the size of a map names that of the map before it several times, so that
    formulas grow with the power of the strides: of `small`, torch traces one that reads pictures
    of any size in half a minute with this, and has not done so in twelve minutes without.
    """
    padding: Any = sys.modules.get("timm.layers.padding")
    if padding is None:  # no part is timm's
        yield
        return
    own = padding.get_same_padding
    padding.get_same_padding = same_padding
    try:
        yield
    finally:
        padding.get_same_padding = own


def same_padding(side: int, kernel: int, stride: int, dilation: int) -> int:
    """Pixels to add to `side`, so that a convolution gives `ceil(side / stride)` of them; as timm
    counts them (`timm.layers.padding.get_same_padding`).
    """
    reach = dilation * (kernel - 1) + 1
    added = ((side + stride - 1) // stride - 1) * stride + reach - side
    return added if reach >= stride else max(added, 0)
