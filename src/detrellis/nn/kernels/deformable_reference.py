"""Multi-scale deformable attention from standard operations: what the fast paths are tested
against, what is exported, and what any device can run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from detrellis.nn.kernels.grid import grid_sample

Shapes = Sequence[tuple[int, int]]


def ms_deform_attn_reference(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """As `ms_deform_attn`, level by level,
    so that at most one level's samples exist at a time. Types must agree.
    """
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    # grid_sample puts -1 and 1 on the map's outer edges, as the pixel rule `location * size - 0.5`
    # does.
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B*M, N, V, P, 2)
    of_heads = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # (B*M, 1, N, V, P)
    out = value.new_zeros(())
    for level, tokens in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        image = tokens.permute(0, 2, 3, 1).reshape(batch * heads, width, *shapes[level])
        samples = grid_sample(image, grids[:, :, level])
        out = out + (samples * of_heads[..., level, :]).sum(-1)
    return out.view(batch, heads * width, queries).transpose(1, 2)
