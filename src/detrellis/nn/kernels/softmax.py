"""Softmax over rows that are shorter than a CPU's vector."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from detrellis.nn.order import exporting

# Numbers in float32 in a vector, by what torch calls the CPU
LANES = {"AVX2": 8, "AVX512": 16}


@cache
def _lanes() -> int:
    return LANES.get(torch.backends.cpu.get_cpu_capability(), 0)


def softmax(x: Tensor) -> Tensor:
    """`x.softmax(-1)`, `(..., K)`; what comes out may lie transposed in memory.

    Where K is less than a vector torch takes one number after the other: with AVX512 twelve points
    take six times as long as sixteen. Across the rows they do not. Graphs keep one operation.
    """
    graph = exporting() or torch.compiler.is_compiling()
    if graph or x.device.type != "cpu" or x.shape[-1] >= _lanes():
        return x.softmax(-1)
    rows = x.reshape(-1, x.shape[-1])
    return rows.t().softmax(0).t().view(x.shape)
