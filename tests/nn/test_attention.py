"""Segmented attention against the readable reference: one square mask over all queries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from detrellis.nn.attention import SelfAttention, segmented_attention
from detrellis.types import Segment


def square_mask(segments: tuple[Segment, ...]) -> Tensor:
    """True where a query may look, `(B, 1, N, N)`."""
    owner = [(s.name, i * s.copies // s.size) for s in segments for i in range(s.size)]
    sees = {s.name: s.sees for s in segments}
    mask = torch.tensor([[q == k or k[0] in sees[q[0]] for k in owner] for q in owner])
    used = torch.cat(
        [torch.ones(2, s.size) if s.unused is None else ~s.unused for s in segments], dim=1
    )
    return mask & (used[:, None, None].bool() | torch.eye(len(owner), dtype=torch.bool))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Segment, ...]:
    """A main block, groups, and blocks that see others, in any order."""
    main = Segment("main", draw(st.integers(1, 5)))
    groups = draw(st.integers(1, 3))
    extra = Segment("groups", groups * draw(st.integers(1, 4)), groups)
    copies = draw(st.integers(1, 3))
    sees = draw(st.sampled_from([(), ("main",), ("main", "groups")]))
    dn = Segment("dn", copies * draw(st.integers(1, 3)), copies, sees)
    some = draw(st.permutations([main, extra, dn]))[: draw(st.integers(1, 3))]
    return tuple(
        s._replace(unused=torch.rand(2, s.size) < 0.5) if draw(st.booleans()) else s for s in some
    )


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_equals_masked_attention(segments: tuple[Segment, ...]) -> None:
    names = {s.name for s in segments}
    segments = tuple(s._replace(sees=tuple(n for n in s.sees if n in names)) for s in segments)
    total = sum(s.size for s in segments)
    generator = torch.Generator().manual_seed(total)
    q, k = (torch.randn(2, 2, total, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 2, total, 6, generator=generator, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=square_mask(segments))
    torch.testing.assert_close(segmented_attention(q, k, v, segments), expected)


def test_no_mask_over_all_queries_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding is what makes groups linear:
    the masks that exist have the rows of a block that sees others only.
    """
    shapes: list[tuple[int, ...]] = []
    attend = F.scaled_dot_product_attention

    def spy(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
    ) -> Tensor:
        if attn_mask is not None:
            shapes.append(tuple(attn_mask.shape))
        return attend(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    segments = (Segment("main", 30), Segment("groups", 300, 10), Segment("dn", 8, 2, ("main",)))
    x = torch.randn(1, 2, 338, 4)
    segmented_attention(x, x, x, segments)
    assert shapes == [(8, 38)]


def test_equals_torch_multihead_attention() -> None:
    ours = SelfAttention(16, 4).double()
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).double()
    theirs.in_proj_weight.data = ours.projections.weight.data
    theirs.in_proj_bias.data = ours.projections.bias.data.normal_()
    theirs.out_proj.load_state_dict(ours.output.state_dict())
    x, position = torch.randn(2, 2, 7, 16, dtype=torch.float64)
    expected, _ = theirs(x + position, x + position, x, need_weights=False)
    torch.testing.assert_close(ours(x, position, (Segment("main", 7),)), expected)


def test_dropout_acts_in_training_only() -> None:
    attention = SelfAttention(16, 4, dropout=0.5)
    x = torch.randn(1, 6, 16)
    segments = (Segment("main", 6),)
    attention.eval()
    assert torch.equal(attention(x, x, segments), attention(x, x, segments))
    attention.train()
    assert not torch.equal(attention(x, x, segments), attention(x, x, segments))
