"""Gaussian priors against the formula cell by cell,
and attention to one map or to one level of several.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.nn.attention import DenseAttention
from detrellis.nn.prior import AtLevel, at_level, level_of, log_prior, map_attention
from detrellis.types import Memory, Prior, Spatial

SHAPE = (3, 5)


def memory(
    shapes: tuple[tuple[int, int], ...] = (SHAPE,), batch: int = 2, width: int = 16
) -> Memory:
    """Noise in float64; the last two tokens of each level are padding in all images but the
    first.
    """
    tokens = sum(h * w for h, w in shapes)
    paddings = []
    for height, width_ in shapes:
        level = torch.zeros(batch, height * width_, dtype=torch.bool)
        level[1:, -2:] = True
        paddings.append(level)
    values, position = torch.randn(2, batch, tokens, width, dtype=torch.float64)
    return Memory(
        values, position, shapes, torch.cat(paddings, dim=1), torch.ones(batch, len(shapes), 2)
    )


def prior(batch: int = 2, queries: int = 4, heads: int = 2, first: float = 0.5) -> Prior:
    centre = torch.rand(batch, queries, heads, 2, dtype=torch.float64) * 5
    return Prior(centre, torch.randn(batch, queries, heads, 2, dtype=torch.float64), first)


def cell_by_cell(found: Prior, shape: tuple[int, int]) -> Tensor:
    """`(B, M, N, H, W)`, one cell after the other, as the formula is written."""
    height, width = shape
    cells = []
    for y in range(height):
        for x in range(width):
            away = torch.tensor([x, y], dtype=torch.float64) + found.first - found.centre
            cells.append(-(found.scale * away).square().sum(-1) / 8)
    return torch.stack(cells, dim=-1).transpose(1, 2).unflatten(-1, shape)


def attention_inputs(keys: int, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys of `keys` heads, and values, of two images and two heads."""
    tokens = SHAPE[0] * SHAPE[1]
    q = torch.randn(2, 2, 4, width, dtype=torch.float64)
    k = torch.randn(2, keys, tokens, width, dtype=torch.float64)
    return q, k, torch.randn(2, 2, tokens, 3, dtype=torch.float64)


@pytest.mark.parametrize("first", [0.0, 0.5])
def test_rows_and_columns_sum_to_the_formula(first: float) -> None:
    found = prior(first=first)
    rows, columns = log_prior(found, SHAPE)
    assert rows.shape == (2, 2, 4, SHAPE[0], 1)
    assert columns.shape == (2, 2, 4, 1, SHAPE[1])
    torch.testing.assert_close(rows + columns, cell_by_cell(found, SHAPE))


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_under_a_prior_equals_a_mask_of_numbers(keys: int, padded: bool) -> None:
    torch.manual_seed(0)
    q, k, v = attention_inputs(keys)
    where, found = memory(), prior()
    if not padded:
        where = where._replace(padding=None, valid_ratios=None)
    inputs = [t.requires_grad_() for t in (q, k, v, *found[:2])]
    mask = cell_by_cell(found, SHAPE).flatten(3)
    if where.padding is not None:
        mask = mask.masked_fill(where.padding[:, None, None], -torch.inf)
    expected = F.scaled_dot_product_attention(q, k.expand(-1, 2, -1, -1), v, attn_mask=mask)
    read, weights = map_attention(q, k, v, where, found)
    torch.testing.assert_close(read, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 4, dtype=torch.float64))
    if where.padding is not None:
        assert not weights[1, ..., -2:].any()
    slope = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, inputs, slope, retain_graph=True) for out in (read, expected))
    for name, ours, theirs in zip(("q", "k", "v", "centre", "scale"), *pairs, strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_scale_of_0_looks_everywhere() -> None:
    q, k, v = attention_inputs(2)
    found = prior()
    everywhere = found._replace(scale=torch.zeros_like(found.scale))
    torch.testing.assert_close(
        map_attention(q, k, v, memory(), everywhere)[0], map_attention(q, k, v, memory())[0]
    )


def test_a_large_scale_looks_at_one_cell() -> None:
    q, k, v = attention_inputs(2)
    cell = torch.tensor([3.5, 1.5], dtype=torch.float64).expand(2, 4, 2, 2)
    read, weights = map_attention(
        q, k, v, memory(), Prior(cell, torch.full_like(cell, 100.0), first=0.5)
    )
    index = 1 * SHAPE[1] + 3
    torch.testing.assert_close(weights[..., index], torch.ones(2, 2, 4, dtype=torch.float64))
    torch.testing.assert_close(read, v[:, :, index : index + 1].expand_as(read))


def test_priors_stay_float32_under_autocast() -> None:
    """In bf16 the cells of a wide map have no numbers of their own: 200 and 201 are the same."""
    shape = (1, 300)
    centre, scale = torch.tensor([[200.0, 0.0], [4.0, 4.0]], dtype=torch.bfloat16)
    half = Prior(centre.expand(1, 1, 1, 2), scale.expand(1, 1, 1, 2))
    q = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)
    k, v = torch.zeros(2, 1, 1, 300, 4, dtype=torch.bfloat16)
    where = Memory(torch.zeros(1, 300, 4), torch.zeros(1, 300, 4), (shape,))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(t.dtype == torch.float32 for t in log_prior(half, shape))
        read, weights = map_attention(q, k, v, where, half)
    assert read.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    assert weights.argmax() == 200
    torch.testing.assert_close(weights[..., 199], weights[..., 201])
    torch.testing.assert_close(
        weights[..., 201] / weights[..., 200], torch.full((1, 1, 1), -2.0).exp()
    )


def test_keys_that_heads_share_are_never_expanded() -> None:
    """What the backward pass keeps has the queries' heads or the keys' tokens,
    never both at the keys' width.
    """
    q, k, v = (t.requires_grad_() for t in attention_inputs(1, width=64))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        map_attention(q, k, v, memory(), prior())
    assert saved
    assert (
        max(t.untyped_storage().nbytes() // t.element_size() for t in saved)
        < q.shape[1] * k.numel()
    )


def test_dropout_drops_weights_that_are_read() -> None:
    torch.manual_seed(0)
    q, k, v = attention_inputs(2)
    kept, weights = map_attention(q, k, v, memory())
    dropped, same = map_attention(q, k, v, memory(), dropout=0.5)
    assert torch.equal(weights, same)
    assert not torch.allclose(kept, dropped)


@pytest.mark.parametrize(
    ("layers", "levels", "expected"),
    [
        (6, 3, [2, 2, 1, 1, 0, 0]),
        (3, 3, [2, 1, 0]),
        (4, 3, [2, 2, 1, 0]),
        (2, 3, [2, 1]),
        (6, 4, [3, 3, 2, 1, 1, 0]),
        (6, 1, [0] * 6),
    ],
)
def test_layers_read_levels_from_coarse_to_fine(
    layers: int, levels: int, expected: list[int]
) -> None:
    assert [level_of(i, layers, levels) for i in range(layers)] == expected


SHAPES = ((4, 6), (2, 3), (1, 2))


def test_one_level_is_a_memory_of_its_own() -> None:
    several = memory(SHAPES)
    ratios = torch.rand(2, 3, 2)
    parts = [at_level(several._replace(valid_ratios=ratios), level) for level in range(3)]
    assert [p.shapes for p in parts] == [(s,) for s in SHAPES]
    assert torch.equal(torch.cat([p.tokens for p in parts], dim=1), several.tokens)
    assert torch.equal(torch.cat([p.position for p in parts], dim=1), several.position)
    assert several.padding is not None
    assert torch.equal(torch.cat([p.padding for p in parts], dim=1), several.padding)  # type: ignore[misc]
    assert torch.equal(torch.cat([p.valid_ratios for p in parts], dim=1), ratios)  # type: ignore[misc]
    bare = at_level(several._replace(padding=None, valid_ratios=None), 1)
    assert bare.padding is None
    assert bare.valid_ratios is None


@pytest.mark.parametrize("level", [0, 1, 2])
def test_attention_at_a_level_reads_that_level_only(level: int) -> None:
    attention: nn.Module = DenseAttention(16, 2).double()
    several = memory(SHAPES)
    x, position = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    out = AtLevel(attention, level)(x, Spatial(position), several)
    torch.testing.assert_close(out, attention(x, Spatial(position), at_level(several, level)))
    sizes = [h * w for h, w in SHAPES]
    for other in range(3):
        start = sum(sizes[:other])
        changed = several.tokens.clone()
        changed[:, start : start + sizes[other]] += 1 + torch.rand(16, dtype=torch.float64)
        found = AtLevel(attention, level)(x, Spatial(position), several._replace(tokens=changed))
        assert torch.equal(found, out) == (other != level)
