"""Deformable attention against a loop over every sample, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detrellis.nn.deformable import DeformableAttention
from detrellis.nn.kernels.deformable import ms_deform_attn
from detrellis.types import Memory, Spatial

SHAPES = ((3, 4), (1, 1), (2, 5))


def inputs(
    batch: int = 2, queries: int = 3, heads: int = 2, points: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in SHAPES)
    value = torch.randn(batch, tokens, heads, 3, generator=generator, dtype=torch.float64)
    # Some samples lie outside the map.
    locations = (
        torch.rand(
            batch, queries, heads, len(SHAPES), points, 2, generator=generator, dtype=torch.float64
        )
        * 1.6
        - 0.3
    )
    weights = torch.rand(
        batch, queries, heads, len(SHAPES), points, generator=generator, dtype=torch.float64
    )
    return value, locations, weights / weights.sum((-1, -2), keepdim=True)


def one_sample(image: Tensor, x: float, y: float) -> Tensor:
    """Bilinear value at pixel coordinates, zero outside; `image (H, W, d)`."""
    height, width = image.shape[:2]
    out = image.new_zeros(image.shape[2])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                out = out + (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
    return out


def test_equals_a_loop_over_samples() -> None:
    value, locations, weights = inputs()
    batch, queries, heads, levels, points = weights.shape
    expected = torch.zeros(batch, queries, heads, 3, dtype=torch.float64)
    starts = [0, 12, 13]
    for b, q, m, level, p in torch.cartesian_prod(
        *map(torch.arange, (batch, queries, heads, levels, points))
    ).tolist():
        (h, w), start = SHAPES[level], starts[level]
        x, y = locations[b, q, m, level, p].tolist()
        image = value[b, start : start + h * w, m].view(h, w, 3)
        expected[b, q, m] += weights[b, q, m, level, p] * one_sample(
            image, x * w - 0.5, y * h - 0.5
        )
    torch.testing.assert_close(
        ms_deform_attn(value, SHAPES, locations, weights), expected.flatten(2)
    )


def test_gradients() -> None:
    value, locations, weights = (t.requires_grad_() for t in inputs(1, 2, 1, 1))
    assert torch.autograd.gradcheck(
        lambda v, x, w: ms_deform_attn(v, SHAPES, x, w), (value, locations, weights)
    )


def test_starts_as_one_direction_a_head() -> None:
    module = DeformableAttention(32, 4, 3, 2)
    bias = module.sampling_offsets.bias.view(4, 3, 2, 2)
    assert torch.equal(bias[:, 0], bias[:, 2])  # the same on every level
    torch.testing.assert_close(bias[0, 0], torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    torch.testing.assert_close(
        bias[1, 0], torch.tensor([[0.0, 1.0], [0.0, 2.0]]), atol=1e-6, rtol=0
    )
    assert module.attention_weights.weight.abs().sum() == 0


def test_points_and_boxes_without_size_differ_only_in_the_offsets() -> None:
    """A box of size zero has no room for offsets: all samples fall on its centre."""
    module = DeformableAttention(16, 2, len(SHAPES), 2)
    tokens = torch.randn(1, sum(h * w for h, w in SHAPES), 16)
    memory = Memory(tokens, tokens, SHAPES)
    x, zero = torch.randn(1, 4, 16), torch.zeros(1, 4, 16)
    points = torch.rand(1, 4, 2)
    boxes = torch.cat([points, torch.zeros(1, 4, 2)], dim=-1)
    with torch.no_grad():
        different = module(x, Spatial(zero, points), memory)
        module.sampling_offsets.bias.zero_()
        torch.testing.assert_close(
            module(x, Spatial(zero, points), memory), module(x, Spatial(zero, boxes), memory)
        )
        assert not torch.allclose(different, module(x, Spatial(zero, points), memory))


@pytest.mark.parametrize("points", [2, (2, 4, 2)])
@pytest.mark.parametrize("views", [1, len(SHAPES)])
def test_offsets_around_points_count_the_cells_of_each_level(
    points: int | tuple[int, ...], views: int
) -> None:
    """Also of maps that are not square, and where levels have points of different number."""
    module = DeformableAttention(16, 2, len(SHAPES), points)
    tokens = torch.zeros(1, 1, 16)
    references = torch.rand(3, 4, views, 2)
    offsets = torch.randn(3, 4, 2, module.levels, module.points, 2)
    found = module.locations(offsets, references, Memory(tokens, tokens, SHAPES))
    for place, level in enumerate(module.order):
        height, width = SHAPES[level]
        moved = offsets[:, :, :, place] / torch.tensor([width, height])
        around = references[:, :, min(level, views - 1), None, None]
        torch.testing.assert_close(found[:, :, :, place], around + moved)
