"""Rows in pieces that stay in the caches: what comes out, and when there are any."""

import pytest
import torch
from torch import Tensor

from detrellis.nn import pieces
from detrellis.nn.deformable import DeformableAttention
from detrellis.nn.mlp import FeedForward
from detrellis.nn.pieces import in_pieces
from detrellis.types import Memory, Spatial

SHAPES = ((6, 7), (3, 4))
TOKENS = sum(height * width for height, width in SHAPES)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few rows each."""
    monkeypatch.setattr(pieces, "VALUES", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def rows_seen(rows: int, *, batch: int = 2, width: int = 8) -> list[int]:
    """How many rows each call got; the result is checked."""
    seen = []

    def double(x: Tensor, y: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return x + y

    x, y = torch.rand(batch, rows, 3), torch.rand(1, rows, 1)
    torch.testing.assert_close(in_pieces(double, x, y, width=width), x + y, rtol=0, atol=0)
    return seen


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("rows", [1, 4, 5, 9, 100])
def test_covers_all_rows_in_order_in_even_pieces(rows: int) -> None:
    with torch.no_grad():
        seen = rows_seen(rows)
    assert sum(seen) == rows
    assert max(seen) <= 64 / (2 * 8)
    assert max(seen) - min(seen) <= 1


@pytest.mark.usefixtures("small")
def test_no_rows_are_one_call() -> None:
    with torch.no_grad():
        assert rows_seen(0) == [0]


@pytest.mark.usefixtures("small")
def test_a_row_wider_than_a_piece_is_not_split() -> None:
    with torch.no_grad():
        assert rows_seen(3, width=1000) == [1, 1, 1]


def test_more_threads_take_more_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "VALUES", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with torch.no_grad():
        assert len(rows_seen(96)) == 96 * 2 * 8 / (4 * 64)


@pytest.mark.usefixtures("small")
def test_where_gradients_keep_what_is_between_all_rows_are_one_call() -> None:
    assert rows_seen(100) == [100]


@pytest.mark.usefixtures("small")
def test_other_devices_take_all_rows_at_once() -> None:
    calls = []
    with torch.no_grad():
        in_pieces(
            lambda x: (calls.append(len(x)), x)[1], torch.empty(2, 100, 3, device="meta"), width=8
        )
    assert len(calls) == 1


@pytest.mark.usefixtures("small")
def test_graphs_take_all_rows_at_once() -> None:
    with torch.no_grad():
        graph = torch.export.export(FeedForward(8, 32).eval(), (torch.randn(2, 50, 8),)).graph
    assert sum("linear" in str(node.target) for node in graph.nodes) == 2


@pytest.mark.usefixtures("small")
def test_feed_forward_is_the_same_in_pieces() -> None:
    torch.manual_seed(0)
    block, x = FeedForward(8, 32), torch.randn(2, 50, 8)
    whole = block(x)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(block(x), whole)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("sides", [2, 4])
@pytest.mark.parametrize("points", [2, (2, 4)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("discrete", [False, True])
def test_deformable_attention_is_the_same_in_pieces(
    sides: int, points: int | tuple[int, ...], padded: bool, discrete: bool
) -> None:
    torch.manual_seed(0)
    attention = DeformableAttention(16, 4, 2, points, discrete=discrete)
    torch.nn.init.normal_(attention.sampling_offsets.weight)
    torch.nn.init.normal_(attention.attention_weights.weight)
    memory = Memory(
        tokens=torch.randn(2, TOKENS, 16),
        position=torch.randn(2, TOKENS, 16),
        shapes=SHAPES,
        padding=torch.rand(2, TOKENS) < 0.2 if padded else None,
        valid_ratios=torch.rand(2, 2, 2) / 2 + 0.5 if padded else None,
    )
    x = torch.randn(2, 30, 16)
    references = torch.rand(2, 30, sides)
    where = Spatial(torch.randn(2, 30, 16), references)
    whole = attention(x, where, memory)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(attention(x, where, memory), whole)
