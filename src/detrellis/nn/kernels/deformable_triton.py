"""Triton kernels of multi-scale deformable attention, for CUDA.

One program samples a block of queries of one image and head. A sample's place and corner weights
are computed once and used for all `d` channels, which lie side by side, so that a row is read in
few wide loads. Sums are float32 (float64 for float64), whatever the type of the rows. In the
backward pass the gradients of locations and weights are sums over channels, reduced inside the
program and written once. Gradients of rows meet in memory: as atomic additions, or, under
`torch.use_deterministic_algorithms`, sorted by row and summed in a fixed order by a second kernel.

Tested without a GPU: results in Triton's interpreter (`TRITON_INTERPRET=1`), and that all kernels
compile; with one, both on it. docs/performance.md says how fast they are on an H200; the block
sizes are not tuned.
"""

# Triton has no types, and what is inside a kernel is not Python.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from detrellis.nn.kernels.deformable_bag import sample_levels

Shapes = Sequence[tuple[int, int]]

# 32 queries x 32 channels on 4 warps: a thread holds 8 channels of one query, 16 bytes in half
# precision.
BLOCK, WARPS = 32, 4
KEEP, ADD, NOTE = 0, 1, 2  # what the backward kernel does with the gradients of rows

# Of the kernels, `SIZES` is (heads, samples a head, channels, the next power of two, queries a
# program, type of sums).


@triton.jit
def _cell(location, size):
    """One axis of the cells around samples:
    low index, linear weights of both neighbours, which are inside.
    """
    pixels = location * size - 0.5
    floor = tl.floor(pixels)
    low = floor.to(tl.int32)
    fraction = pixels - floor
    low_inside = (low >= 0) & (low < size)
    high_inside = (low >= -1) & (low < size - 1)
    return (
        low,
        tl.where(low_inside, 1 - fraction, 0.0),
        tl.where(high_inside, fraction, 0.0),
        low_inside,
        high_inside,
    )


@triton.jit
def _sample(locations, weights, levels, bag, k, known, SAMPLES: tl.constexpr):
    """Sample `k` of every query:
    first token and width of its level, its cell in x and in y, its weight and place.
    """
    width = tl.load(levels + k)
    height = tl.load(levels + SAMPLES + k)
    first = tl.load(levels + 2 * SAMPLES + k)
    at = bag * SAMPLES + k
    # Queries beyond the last one sample far outside.
    x = _cell(tl.load(locations + 2 * at, mask=known, other=-9.0), width)
    y = _cell(tl.load(locations + 2 * at + 1, mask=known, other=-9.0), height)
    weight = tl.load(weights + at, mask=known, other=0.0)
    return first + y[0] * width + x[0], x, y, weight, at, width, height


@triton.jit
def _row(base, token, inside, SIZES: tl.constexpr):
    """Rows of the tokens, `(block, channels)` in the type of sums, zero outside the map."""
    channels = tl.arange(0, SIZES[3])
    at = base + token[:, None] * (SIZES[0] * SIZES[2]) + channels[None, :]
    return tl.load(at, mask=inside[:, None] & (channels < SIZES[2])[None, :], other=0.0).to(
        SIZES[5]
    )


@triton.jit(do_not_specialize=["tokens", "queries"])  # images differ in size
def _forward_kernel(value, locations, weights, levels, out, tokens, queries, SIZES: tl.constexpr):
    HEADS: tl.constexpr = SIZES[0]
    WIDTH: tl.constexpr = SIZES[2]
    # By name: a shape of a tuple's items does not compile in Triton 3.6
    LANES: tl.constexpr = SIZES[3]
    QUERIES: tl.constexpr = SIZES[4]
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    known = query < queries
    base = value + (image * tokens * HEADS + head) * WIDTH
    bag = (image * queries + query) * HEADS + head
    total = tl.zeros((QUERIES, LANES), dtype=SIZES[5])
    for k in range(SIZES[1]):
        token, x, y, weight, _, width, _ = _sample(
            locations, weights, levels, bag, k, known, SIZES[1]
        )
        _, left, right, x0, x1 = x
        _, top, bottom, y0, y1 = y
        upper = left[:, None] * _row(base, token, x0 & y0, SIZES)
        upper += right[:, None] * _row(base, token + 1, x1 & y0, SIZES)
        lower = left[:, None] * _row(base, token + width, x0 & y1, SIZES)
        lower += right[:, None] * _row(base, token + width + 1, x1 & y1, SIZES)
        total += (top * weight)[:, None] * upper + (bottom * weight)[:, None] * lower
    channels = tl.arange(0, LANES)
    at = out + bag[:, None] * WIDTH + channels[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=known[:, None] & (channels < WIDTH)[None, :])


@triton.jit
def _corner(
    places,
    slot,
    gradient,
    token,
    row,
    inside,
    row_weight,
    SIZES: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Gradient times row at one corner.
    The row's own gradient is added in memory, or noted for a sort.
    """
    value, for_value, ids, row_weights = places
    product = tl.sum(_row(value + row * SIZES[2], token, inside, SIZES) * gradient, axis=1)
    if SPREAD == 1:
        channels = tl.arange(0, SIZES[3])
        at = for_value + row * SIZES[2] + token[:, None] * (SIZES[0] * SIZES[2]) + channels[None, :]
        mask = inside[:, None] & (channels < SIZES[2])[None, :]
        tl.atomic_add(at, row_weight[:, None] * gradient, mask=mask, sem="relaxed")
    if SPREAD == 2:
        tl.store(ids + slot, row + token * SIZES[0], mask=inside)
        tl.store(row_weights + slot, row_weight, mask=inside)
    return product


@triton.jit(do_not_specialize=["tokens", "queries"])  # images differ in size
def _backward_kernel(
    gradient,
    inputs,
    levels,
    places,
    outputs,
    tokens,
    queries,
    SIZES: tl.constexpr,
    SPREAD: tl.constexpr,
):
    HEADS: tl.constexpr = SIZES[0]
    locations, weights = inputs
    for_locations, for_weights = outputs
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    query = tl.program_id(0) * SIZES[4] + tl.arange(0, SIZES[4])
    known = query < queries
    row = image * tokens * HEADS + head
    bag = (image * queries + query) * HEADS + head
    channels = tl.arange(0, SIZES[3])
    own_at = gradient + bag[:, None] * SIZES[2] + channels[None, :]
    own = tl.load(own_at, mask=known[:, None] & (channels < SIZES[2])[None, :], other=0.0).to(
        SIZES[5]
    )
    for k in range(SIZES[1]):
        token, x, y, weight, at, width, height = _sample(
            locations, weights, levels, bag, k, known, SIZES[1]
        )
        _, left, right, x0, x1 = x
        _, top, bottom, y0, y1 = y
        upper, lower, below = top * weight, bottom * weight, token + width
        d00 = _corner(places, 4 * at, own, token, row, x0 & y0, upper * left, SIZES, SPREAD)
        d01 = _corner(
            places, 4 * at + 1, own, token + 1, row, x1 & y0, upper * right, SIZES, SPREAD
        )
        d10 = _corner(places, 4 * at + 2, own, below, row, x0 & y1, lower * left, SIZES, SPREAD)
        d11 = _corner(
            places, 4 * at + 3, own, below + 1, row, x1 & y1, lower * right, SIZES, SPREAD
        )
        # Products outside the map are zero, so the derivative of a linear weight is -1 or +1.
        tl.store(
            for_locations + 2 * at,
            (top * (d01 - d00) + bottom * (d11 - d10)) * weight * width,
            mask=known,
        )
        tl.store(
            for_locations + 2 * at + 1,
            (left * (d10 - d00) + right * (d11 - d01)) * weight * height,
            mask=known,
        )
        tl.store(
            for_weights + at,
            top * (left * d00 + right * d01) + bottom * (left * d10 + right * d11),
            mask=known,
        )


@triton.jit
def _sum_kernel(gradient, order, row_weights, starts, out, SIZES: tl.constexpr):
    """The gradient of one row: its entries, `starts[row]` to `starts[row + 1]`, in order."""
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = SIZES[3]
    channels = tl.arange(0, LANES)
    total = tl.zeros((LANES,), dtype=SIZES[5])
    i, end = tl.load(starts + row), tl.load(starts + row + 1)
    while i < end:  # not `for`, whose bounds must be numbers to Triton 3.6's interpreter
        entry = tl.load(order + i)
        at = gradient + (entry // (4 * SIZES[1])) * SIZES[2] + channels
        total += tl.load(row_weights + entry) * tl.load(at, mask=channels < SIZES[2], other=0.0).to(
            SIZES[5]
        )
        i += 1
    tl.store(out + row * SIZES[2] + channels, total, mask=channels < SIZES[2])


@cache
def _levels(shapes: tuple[tuple[int, int], ...], points: int, device: torch.device) -> Tensor:
    """As `sample_levels`; copied to the device once for each image size."""
    return sample_levels(shapes, points, torch.int32).to(device)


def _sizes(value: Tensor, weights: Tensor) -> tuple[object, ...]:
    heads, width = value.shape[2:]
    precise = tl.float64 if value.dtype == torch.float64 else tl.float32
    return heads, weights.shape[3:].numel(), width, triton.next_power_of_2(width), BLOCK, precise


def forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, gradients: bool
) -> Tensor:
    """Sampled values `(B, N, M * d)` in the value's type; locations and weights are float32, or
    float64 if it is. Whether there will be a backward pass makes no difference."""
    batch, queries, heads = weights.shape[:3]
    out = value.new_zeros(batch, queries, heads * value.shape[-1])
    if not weights.numel() or not value.numel():
        return out
    levels = _levels(tuple(shapes), weights.shape[-1], value.device)
    inputs = (value.contiguous(), locations.contiguous(), weights.contiguous(), levels)
    grid = (triton.cdiv(queries, BLOCK), batch * heads)
    _forward_kernel[grid](
        *inputs, out, value.shape[1], queries, SIZES=_sizes(value, weights), num_warps=WARPS
    )
    return out


def backward(
    gradient: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Shapes,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value (if `needs[0]`), locations and weights (if `needs[1]`);
    empty where there is no need.
    """
    batch, queries, heads = weights.shape[:3]
    sorts = needs[0] and torch.are_deterministic_algorithms_enabled()
    spread = NOTE if sorts else ADD if needs[0] else KEEP
    precise = torch.promote_types(value.dtype, torch.float32)
    gradient, value = gradient.contiguous(), value.contiguous()
    inputs = locations.contiguous(), weights.contiguous()
    for_value = torch.zeros(value.shape if needs[0] else 0, dtype=precise, device=value.device)
    outputs = torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1])
    entries = 4 * weights.numel() if sorts else 0
    rows = value.shape[:3].numel()
    ids = torch.full((entries,), rows, device=value.device)  # beyond the last row: outside the map
    row_weights = weights.new_zeros(entries)
    if weights.numel() and value.numel():
        levels = _levels(tuple(shapes), weights.shape[-1], value.device)
        sizes = _sizes(value, weights)
        grid = (triton.cdiv(queries, BLOCK), batch * heads)
        lengths = value.shape[1], queries
        places = value, for_value, ids, row_weights
        _backward_kernel[grid](
            gradient,
            inputs,
            levels,
            places,
            outputs,
            *lengths,
            SIZES=sizes,
            SPREAD=spread,
            num_warps=WARPS,
        )
        if sorts:
            ids, order = ids.sort(stable=True)
            starts = torch.searchsorted(ids, torch.arange(rows + 1, device=ids.device))
            _sum_kernel[(rows,)](
                gradient, order, row_weights, starts, for_value, SIZES=sizes, num_warps=1
            )
    if not needs[1]:
        return for_value.to(value.dtype), weights.new_empty(0), weights.new_empty(0)
    return for_value.to(value.dtype), *outputs


def probe() -> None:
    """Run a tiny example on the GPU; raises what Triton raises where it cannot."""
    value = torch.ones(1, 1, 1, 1, device="cuda")
    place = torch.full((1, 1, 1, 1, 1, 2), 0.5, device="cuda")
    weight = place[..., 0].contiguous()
    backward(
        forward(value, place, weight, [(1, 1)], True), value, place, weight, [(1, 1)], [True, True]
    )
