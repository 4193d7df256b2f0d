"""SMCA's parts: where queries look,
attention under priors on several levels, and self-attention within each level.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from detrellis.nn.attention import DenseAttention
from detrellis.nn.prior import at_level
from detrellis.nn.smca import IntraScaleAttention, ModulatedAttention, ModulatedPriors, read_point
from detrellis.types import Memory, Prior, Queries, Spatial

WIDTH, HEADS, QUERIES = 16, 2, 5
SHAPES = ((4, 6), (2, 3), (1, 2))
STRIDES = (16, 32, 64)


def memory(levels: int = 3, *, padded: bool = True) -> Memory:
    """Noise in float64; the second image of two has half of the first's columns."""
    shapes = SHAPES[:levels]
    tokens = sum(h * w for h, w in shapes)
    values, position = torch.randn(2, 2, tokens, WIDTH, dtype=torch.float64)
    if not padded:
        return Memory(values, position, shapes)
    masks, ratios = [], torch.ones(2, levels, 2, dtype=torch.float64)
    for level, (height, width) in enumerate(shapes):
        mask = torch.zeros(2, height, width, dtype=torch.bool)
        mask[1, :, (width + 1) // 2 :] = True
        ratios[1, level, 0] = ((width + 1) // 2) / width
        masks.append(mask.flatten(1))
    return Memory(values, position, shapes, torch.cat(masks, dim=1), ratios)


def queries() -> Queries:
    content, position = torch.randn(2, 2, QUERIES, WIDTH, dtype=torch.float64)
    return Queries(content, position, torch.rand(2, QUERIES, 2, dtype=torch.float64))


def where(levels: int, scale: float = 1.0) -> Spatial:
    """Priors of one scale around the same random points, equal shares of all levels."""
    point = torch.rand(2, QUERIES, HEADS, 2, dtype=torch.float64)
    priors = tuple(
        Prior(point * torch.tensor([w, h]), torch.full_like(point, scale))
        for h, w in SHAPES[:levels]
    )
    shares = (
        torch.full((2, QUERIES, levels), 1 / levels, dtype=torch.float64) if levels > 1 else None
    )
    return Spatial(
        torch.randn(2, QUERIES, WIDTH, dtype=torch.float64), priors=priors, level_weights=shares
    )


def attentions() -> tuple[ModulatedAttention, DenseAttention]:
    """With the same weights."""
    ours, plain = ModulatedAttention(WIDTH, HEADS).double(), DenseAttention(WIDTH, HEADS).double()
    nn.init.normal_(ours.projections.bias)
    nn.init.normal_(ours.output.bias)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


# Priors


def test_fresh_priors_are_one_cell_beyond_the_point_and_as_wide_as_their_stride_says() -> None:
    q, where_to = queries(), memory()
    found = ModulatedPriors(WIDTH, HEADS, 2, STRIDES).double()(1, q.content, q, q.boxes, where_to)
    assert torch.equal(found.position, q.position)
    assert torch.equal(found.references, q.boxes)
    assert where_to.valid_ratios is not None
    for level, ((height, width), scale) in enumerate(
        zip(SHAPES, (0.5**0.5, 1.0, 2**0.5), strict=True)
    ):
        cells = torch.tensor([width, height]) * where_to.valid_ratios[:, level]
        centre = (q.boxes * cells[:, None] + 1).unsqueeze(2).expand(-1, -1, HEADS, -1)
        torch.testing.assert_close(found.priors[level].centre, centre)
        torch.testing.assert_close(found.priors[level].scale, torch.full_like(centre, scale))
        assert found.priors[level].first == 0
    torch.testing.assert_close(
        found.level_weights.sum(-1), torch.ones(2, QUERIES, dtype=torch.float64)
    )


def test_one_level_has_no_shares() -> None:
    priors, q = ModulatedPriors(WIDTH, HEADS, 2, (32,)).double(), queries()
    assert not priors.levels
    found = priors(0, q.content, q, q.boxes, memory(1))
    assert found.level_weights is None
    assert len(found.priors) == 1


def test_each_layer_and_each_image_has_its_own() -> None:
    priors, q, where_to = ModulatedPriors(WIDTH, HEADS, 2, STRIDES).double(), queries(), memory()
    for p in priors.parameters():
        nn.init.normal_(p)
    first, second = (priors(i, q.content, q, q.boxes, where_to) for i in range(2))
    assert not torch.allclose(first.priors[0].centre, second.priors[0].centre)
    assert not torch.allclose(first.level_weights, second.level_weights)
    used = torch.autograd.grad(
        second.priors[0].centre.sum()
        + second.priors[0].scale.sum()
        + second.level_weights.square().sum(),
        list(priors.parameters()),
        allow_unused=True,
    )
    names = [k for k, _ in priors.named_parameters()]
    assert all((slope is not None) == (".1." in k) for k, slope in zip(names, used, strict=True))
    alone = priors(0, q.content[1:], Queries(*(t[1:] for t in q)), q.boxes[1:], one(where_to))
    torch.testing.assert_close(alone.level_weights, first.level_weights[1:])
    torch.testing.assert_close(alone.priors[2].centre, first.priors[2].centre[1:])


def one(several: Memory) -> Memory:
    """The second image alone, still padded."""
    return Memory(*(t[1:] if isinstance(t, Tensor) else t for t in several))


def test_the_point_is_read_off_the_position() -> None:
    assert read_point(WIDTH)(torch.randn(QUERIES, WIDTH)).shape == (QUERIES, 2)


# Attention


def test_without_constraint_it_is_dense_attention() -> None:
    ours, plain = attentions()
    x, where_to = torch.randn(2, QUERIES, WIDTH, dtype=torch.float64), memory(1)
    place = where(1, scale=0.0)
    torch.testing.assert_close(ours(x, place, where_to), plain(x, place, where_to))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_whole_share_of_a_level_is_dense_attention_to_it(level: int) -> None:
    ours, plain = attentions()
    x, where_to = torch.randn(2, QUERIES, WIDTH, dtype=torch.float64), memory()
    place = where(3, scale=0.0)
    shares = torch.eye(3, dtype=torch.float64)[level].expand(2, QUERIES, 3)
    out = ours(x, place._replace(level_weights=shares), where_to)
    torch.testing.assert_close(out, plain(x, place, at_level(where_to, level)))


def test_shares_sum_what_the_levels_say() -> None:
    ours, _ = attentions()
    x, where_to, place = torch.randn(2, QUERIES, WIDTH, dtype=torch.float64), memory(), where(3)
    shares = torch.rand(2, QUERIES, 3, dtype=torch.float64).softmax(-1)
    alone = torch.eye(3, dtype=torch.float64)
    parts = [
        ours(x, place._replace(level_weights=alone[i].expand(2, QUERIES, 3)), where_to)
        for i in range(3)
    ]
    bias = ours.output.bias
    expected = sum(((p - bias) * shares[..., i, None] for i, p in enumerate(parts)), bias)
    torch.testing.assert_close(ours(x, place._replace(level_weights=shares), where_to), expected)


@pytest.mark.parametrize("levels", [1, 3])
def test_what_it_attends_to_sums_to_one_and_is_what_it_reads(levels: int) -> None:
    ours, _ = attentions()
    x = torch.randn(2, QUERIES, WIDTH, dtype=torch.float64)
    where_to = memory(levels)
    place = where(levels)
    read, weights = ours.attend(x, place, where_to)
    assert [w.shape for w in weights] == [(2, HEADS, QUERIES, h * w) for h, w in SHAPES[:levels]]
    torch.testing.assert_close(
        torch.cat(weights, -1).sum(-1), torch.ones(2, HEADS, QUERIES, dtype=torch.float64)
    )
    assert where_to.padding is not None
    assert not torch.cat(weights, -1).transpose(1, 3)[where_to.padding].any()
    together = torch.stack(read).sum(0).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours(x, place, where_to), ours.output(together))


def test_padding_is_never_read() -> None:
    ours, _ = attentions()
    x, where_to, place = torch.randn(2, QUERIES, WIDTH, dtype=torch.float64), memory(), where(3)
    assert where_to.padding is not None
    dirty = where_to._replace(tokens=where_to.tokens + 100 * where_to.padding.unsqueeze(-1))
    torch.testing.assert_close(ours(x, place, where_to), ours(x, place, dirty))


@pytest.mark.parametrize("levels", [1, 3])
def test_every_parameter_learns(levels: int) -> None:
    torch.manual_seed(0)
    ours = ModulatedAttention(WIDTH, HEADS, dropout=0.1).double()
    priors = ModulatedPriors(WIDTH, HEADS, 1, STRIDES[:levels]).double()
    point = read_point(WIDTH).double()
    q = queries()
    q = q._replace(boxes=point(q.position).sigmoid())
    where_to = memory(levels, padded=False)
    out: Tensor = ours(q.content, priors(0, q.content, q, q.boxes, where_to), where_to)
    (out * torch.randn_like(out)).sum().backward()
    for module in (ours, priors, point):
        for name, p in module.named_parameters():
            assert p.grad is not None, name
            # The offsets and scales start as constants; what they are read off learns once their
            # weights have moved.
            assert p.grad.any() or name.startswith("norms."), name


def test_dropout_acts_in_training_only() -> None:
    ours = ModulatedAttention(WIDTH, HEADS, dropout=0.5).double()
    x, where_to, place = torch.randn(2, QUERIES, WIDTH, dtype=torch.float64), memory(), where(3)
    assert not torch.equal(ours(x, place, where_to), ours(x, place, where_to))
    ours.eval()
    assert torch.equal(ours(x, place, where_to), ours(x, place, where_to))


# Self-attention within each level


def test_levels_attend_to_themselves_with_the_same_weights() -> None:
    attention, where_to = IntraScaleAttention(WIDTH, HEADS).double(), memory()
    out = attention(where_to.tokens, Spatial(where_to.position), where_to)
    parts = [at_level(where_to, level) for level in range(3)]
    expected = [attention.attention(p.tokens, Spatial(p.position), p) for p in parts]
    torch.testing.assert_close(out, torch.cat(expected, dim=1))


def test_levels_do_not_see_each_other() -> None:
    attention, where_to = IntraScaleAttention(WIDTH, HEADS).double(), memory(padded=False)
    changed = where_to.tokens.clone()
    changed[:, 24:30] += torch.rand(WIDTH, dtype=torch.float64)
    before, after = (
        attention(t, Spatial(where_to.position[:1]), where_to._replace(tokens=t))
        for t in (where_to.tokens, changed)
    )
    same = (before == after).all(-1).all(0)
    assert same[:24].all()
    assert same[30:].all()
    assert not same[24:30].any()
