"""Where no gradient needs what a network computes in between: memory used again, which costs a CPU
less than new memory does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detrellis.nn.constants import traced

# That a thread works on at a time: 4 MB in float32, which caches hold
VALUES = 2**20


def overwrites() -> bool:
    """Whether an activation may be written over its inputs, which nobody else has: where no
    gradient needs them. New memory costs more than the arithmetic. Not in graphs, which say it by
    themselves.
    """
    return not torch.is_grad_enabled() and not traced()


def in_pieces(compute: Callable[..., Tensor], *inputs: Tensor, width: int) -> Tensor:
    """`compute(*inputs)`, `(B, N, ...)` as the inputs are, whose rows do not read one another.

    `width`: about how many values are there at a time for a row. On a CPU, without gradients, it
    computes as many rows at a time as stay in the caches, in memory that is used again: the same
    values up to rounding.
    """
    batch, rows = inputs[0].shape[:2]
    if inputs[0].device.type != "cpu" or not overwrites():
        return compute(*inputs)
    values = batch * rows * width
    count = min(rows, math.ceil(values / (VALUES * torch.get_num_threads())))
    if count < 2:
        return compute(*inputs)
    parts: Any = zip(*(x.tensor_split(count, dim=1) for x in inputs), strict=True)
    return torch.cat([compute(*part) for part in parts], dim=1)
