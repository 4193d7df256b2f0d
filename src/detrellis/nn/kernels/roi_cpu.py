"""RoIAlign on a CPU, as bags of weighted table rows.

The maps of all levels and images are one table, a row for each place. What one cell of one region
reads is a *bag* of rows: RoIAlign's mean over samples of bilinear interpolation is a product of
weights along y and along x. The forward pass is one `embedding_bag`; the backward pass is a product
with the bags as a sparse matrix, transposed. For the 2048 regions of a small training step both
take a tenth of the time of torchvision's loops (0.07 against 0.78 s), whose gradient walks over
memory in steps of a whole map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.sparse import csc_array
from torch import Tensor
from torch.autograd.function import once_differentiable


def align(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    cells: int,
) -> Tensor:
    """`(R, cells, cells, D)` of regions `boxes (R, 4)`,
    each from its `image (R,)` and `level (R,)`.
    """
    table = torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps])
    # Height, width and first row of each region's map, and its stride.
    shapes = torch.tensor([(m.shape[2], m.shape[3]) for m in maps])
    places = shapes.prod(1) * len(maps[0])
    height, width = shapes[level].unbind(1)
    first = (places.cumsum(0) - places)[level] + image * height * width
    corners = boxes / torch.tensor(strides).to(boxes)[level].unsqueeze(1) - 0.5
    y, along_y = spans(corners[:, 1], corners[:, 3], height, cells)
    x, along_x = spans(corners[:, 0], corners[:, 2], width, cells)
    rows_y = first[:, None, None] + y * width[:, None, None]
    # (R, cells, cells, places in y, places in x)
    rows = (rows_y[:, :, None, :, None] + x[:, None, :, None, :]).flatten(0, 2).flatten(1)
    weights = (along_y[:, :, None, :, None] * along_x[:, None, :, None, :]).flatten(0, 2).flatten(1)
    used = weights > 0
    starts = F.pad(used.sum(1).cumsum(0), (1, 0))
    read: Tensor = _Bags.apply(table, rows[used], starts, weights[used])
    return read.view(len(boxes), cells, cells, table.shape[1])


def spans(low: Tensor, high: Tensor, size: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Places `(R, cells, K)` that each cell of a region reads along one axis, and their weights.

    From `low (R,)` to `high (R,)` in places; the map has `size (R,)` of them. Each cell is the mean
    over samples less than a place apart. A sample up to one place outside the map counts as on its
    border, one farther away as 0.
    """
    # Where the samples are, (R, cells, samples); regions with fewer than the largest have unused
    # ones.
    low, each, size = low[:, None, None], ((high - low) / cells)[:, None, None], size[:, None, None]
    samples = each.ceil()
    max_samples = max(int(samples.amax()), 1) if len(samples) else 1
    sample, cell = (torch.arange(n).to(low) for n in (max_samples, cells))
    at = low + cell[:, None] * each + (sample + 0.5) * (each / samples.clamp(min=1))
    used = (sample < samples) & (at >= -1) & (at <= size)
    at = torch.minimum(at.clamp(min=0), size - 1)
    # The places beside them, and the mean of linear weights over the samples.
    place = at[..., :1].floor() + torch.arange(max_samples + 1).to(low)
    near = (1 - (at.unsqueeze(-1) - place.unsqueeze(-2)).abs()).clamp(min=0) * used.unsqueeze(-1)
    return place.long(), near.sum(2) / samples.clamp(min=1)


class _Bags(torch.autograd.Function):
    """Sums `(bags, D)` of rows of a table `(N, D)` times weights;
    bag `i` has the entries `starts[i]` to `starts[i + 1]`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, starts, weights)
        ctx.places = len(table)
        return F.embedding_bag(rows, table, starts[:-1], mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rows, starts, weights = (t.numpy() for t in ctx.saved_tensors)
        matrix = csc_array((weights, rows, starts), shape=(ctx.places, len(starts) - 1))
        return torch.from_numpy(matrix @ gradient.numpy()), None, None, None
