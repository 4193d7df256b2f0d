"""Multi-scale deformable attention on a CPU, as bags of weighted table rows.

The values of all images, tokens and heads are one table `(R, d)`. What one (image, query, head)
reads is a *bag* of `4 * V * P` rows: the four corners of each sample, weighted by bilinear weight x
validity x attention. The forward pass is then one `embedding_bag`, which gathers and sums in one
go, where `grid_sample` writes every sample to memory. In the backward pass the bags are a sparse
matrix with a known structure (all columns have the same length): the products of gradients and rows
are `sampled_addmm`, the gradient of the values is a product with the matrix transposed.

`K` is `V * P`, all samples of a head; `N` is images x queries. Corners are ordered top left, top
right, bottom left, bottom right; in a bag all first corners come first. Every sum has a fixed
order, whatever the number of threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csc_array
from torch import Tensor

INT32_MAX = 2**31 - 1


class Axis(NamedTuple):
    """One axis of the cells around samples, each `(N, M, K)`: indices clamped to the map, which of
    them were inside, and how far the sample is on the way from the low one to the high one, in [0,
    1)."""

    low: Tensor
    high: Tensor
    low_inside: Tensor
    high_inside: Tensor
    fraction: Tensor

    def linear_weights(self) -> tuple[Tensor, Tensor]:
        """Weights of both neighbours in linear interpolation, zero outside the map."""
        return (1 - self.fraction) * self.low_inside, self.fraction * self.high_inside


class Layout(NamedTuple):
    """Where things lie: `levels (3, K)` holds width, height and first token of each sample's level;
    `rows (N, M, 1)` the row of the first token of each bag's image and head."""

    levels: Tensor
    rows: Tensor


def axes(locations: Tensor, levels: Tensor) -> tuple[Axis, Axis]:
    """Cells around the samples `locations (N, M, K, 2)` in x and in y."""
    both = []
    for i in (0, 1):
        size = levels[i]
        pixels = locations[..., i] * size - 0.5
        cell = pixels.floor()
        low = cell.to(levels.dtype)
        # Clamped as integers: whatever a NaN becomes, no index leaves the table. The NaN lives on
        # in the fraction.
        low_clamped = torch.minimum(low.clamp(min=0), size - 1)
        high_clamped = torch.minimum((low + 1).clamp(min=0), size - 1)
        both.append(
            Axis(
                low_clamped,
                high_clamped,
                low_clamped == low,
                high_clamped == low + 1,
                pixels - cell,
            )
        )
    return both[0], both[1]


def entries(x: Axis, y: Axis, weights: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Rows and their weights of every bag, `(N * M, 4 * K)` each."""
    width, _, start = layout.levels
    left, right = x.linear_weights()
    top, bottom = (linear * weights for linear in y.linear_weights())
    upper, lower = y.low * width + start, y.high * width + start
    tokens = torch.stack([upper + x.low, upper + x.high, lower + x.low, lower + x.high], dim=2)
    rows = tokens * weights.shape[1] + layout.rows.unsqueeze(-1)
    row_weights = torch.stack([top * left, top * right, bottom * left, bottom * right], dim=2)
    return rows.flatten(0, 1).flatten(1), row_weights.flatten(0, 1).flatten(1)


def closed_form(
    x: Axis, y: Axis, weights: Tensor, levels: Tensor, products: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of locations and weights from `products (N, M, 4, K)`,
    gradient times row at each corner.
    """
    top_left, top_right, bottom_left, bottom_right = products.unbind(2)
    left, right = x.linear_weights()
    top, bottom = y.linear_weights()
    for_weights = top * (left * top_left + right * top_right) + bottom * (
        left * bottom_left + right * bottom_right
    )
    # The derivative of a linear weight is -1 or +1 inside the map.
    across = top * (top_right * x.high_inside - top_left * x.low_inside)
    across = across + bottom * (bottom_right * x.high_inside - bottom_left * x.low_inside)
    down = left * (bottom_left * y.high_inside - top_left * y.low_inside)
    down = down + right * (bottom_right * y.high_inside - top_right * y.low_inside)
    for_locations = torch.stack(
        [across * (weights * levels[0]), down * (weights * levels[1])], dim=-1
    )
    return for_locations, for_weights


def bags(levels: Tensor, rows: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`entries` from the inputs; the first of the two pieces that may be compiled."""
    x, y = axes(locations, levels)
    return entries(x, y, weights, Layout(levels, rows))


def point_gradients(
    levels: Tensor, ids: Tensor, locations: Tensor, weights: Tensor, table: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of locations and weights from `gradient (N * M, d)`; the second piece that may be
    compiled. Only then is the gather cheap: fused with the product and the sum, the gathered rows
    are never written."""
    products = (table[ids] * gradient[:, None]).sum(-1)
    return closed_form(
        *axes(locations, levels), weights, levels, products.view(*weights.shape[:2], 4, -1)
    )


def eager_point_gradients(
    levels: Tensor, ids: Tensor, locations: Tensor, weights: Tensor, table: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """As `point_gradients`, with the products from a sparse matrix of the bags' pattern."""
    count, length = ids.shape
    starts = torch.arange(0, count * length + 1, length, dtype=ids.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            starts,
            ids.view(-1),
            table.new_zeros(ids.numel()),
            (count, len(table)),
            check_invariants=False,
        )
    products = torch.sparse.sampled_addmm(pattern, gradient, table.t(), beta=0.0).values()
    return closed_form(
        *axes(locations, levels), weights, levels, products.view(*weights.shape[:2], 4, -1)
    )


def scatter(gradient: Tensor, ids: Tensor, row_weights: Tensor, rows: int) -> Tensor:
    """Gradient of the table `(rows, d)`:
    of each row the sum over bags of its weight times the bag's gradient.

    Column by column, in order: 19 ms for an encoder's 2.8 M entries (see benchmarks/deformable.py),
    where a sort and a second `embedding_bag` take 90, an expanded `scatter_add` 119, and a compiled
    loop 17 as long as one thread runs.
    """
    count, length = ids.shape
    starts = np.arange(
        0, count * length + 1, length, dtype=np.int32 if ids.dtype == torch.int32 else np.int64
    )
    matrix = csc_array(
        (row_weights.numpy().ravel(), ids.numpy().ravel(), starts), shape=(rows, count)
    )
    return torch.from_numpy(matrix @ gradient.numpy())


@lru_cache(maxsize=256)
def sample_levels(shapes: tuple[tuple[int, int], ...], points: int, dtype: torch.dtype) -> Tensor:
    """Width, height and first token of each sample's level, `(3, K)`."""
    first, columns = 0, []
    for height, width in shapes:
        columns += [(width, height, first)] * points
        first += height * width
    return torch.tensor(columns, dtype=dtype).t().contiguous()


def lay_out(value: Tensor, shapes: Sequence[tuple[int, int]], weights: Tensor) -> Layout:
    """The layout of `value (B, S, M, d)` for `weights (B, N, M, V, P)`."""
    batch, tokens, heads, _ = value.shape
    wide = max(batch * tokens * heads, 4 * weights.numel()) > INT32_MAX
    dtype = torch.int64 if wide else torch.int32
    image = torch.arange(batch, dtype=dtype).repeat_interleave(weights.shape[1]) * (tokens * heads)
    rows = image[:, None, None] + torch.arange(heads, dtype=dtype)[:, None]
    return Layout(sample_levels(tuple(shapes), weights.shape[-1], dtype), rows)
