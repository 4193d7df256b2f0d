"""Linear layers by oneDNN: the same numbers as torch's,
and torch's own path wherever oneDNN has nothing to offer.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.nn.accelerate import accelerate
from detrellis.nn.attention import DenseAttention, SelfAttention
from detrellis.nn.kernels import linear as module
from detrellis.nn.kernels.linear import linear
from detrellis.types import Memory, Segment, Spatial

FASTER = module._faster.__wrapped__  # without what an earlier question was answered


def missing(path: Path) -> str:
    raise FileNotFoundError(path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often oneDNN was asked, with a threshold that lets small inputs in."""
    if not module._available():
        pytest.skip("this torch has no oneDNN product")
    found: list[int] = []
    product = module._product

    def counted(*arguments: Tensor) -> Tensor:
        found.append(1)
        return product(*arguments)

    monkeypatch.setattr(module, "_product", counted)
    monkeypatch.setattr(module, "WORTH", 1)
    monkeypatch.setattr(module, "_faster", lambda: True)
    return found


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (2, 3, 5, 12), (0, 12)])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_torch(shape: tuple[int, ...], biased: bool, calls: list[int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(9, 12, requires_grad=True)
    inputs = (x, weight, torch.randn(9, requires_grad=True)) if biased else (x, weight)
    actual, expected = linear(*inputs), F.linear(*inputs)
    assert bool(calls) == bool(x.numel())
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_views_and_slices(calls: list[int]) -> None:
    """Rows of a packed matrix, and an input that is not contiguous."""
    x, weight = torch.randn(4, 12, 6).transpose(1, 2), torch.randn(30, 12)
    torch.testing.assert_close(linear(x, weight[10:20]), F.linear(x, weight[10:20]))
    assert calls


def fast_linear() -> nn.Linear:
    layer = nn.Linear(4, 3)
    accelerate(layer)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("kind", [SelfAttention, DenseAttention])
def test_accelerated_modules(kind: type[SelfAttention | DenseAttention], calls: list[int]) -> None:
    """All of their products are oneDNN's, in copies too,
    and their state dicts are those of plain ones.
    """
    plain = kind(8, 2)
    x = torch.randn(2, 5, 8)
    memory = Memory(torch.randn(2, 6, 8), torch.randn(1, 6, 8), ((2, 3),))
    fast = copy.deepcopy(plain)
    accelerate(fast)
    again = copy.deepcopy(fast)
    inputs = (x, x, [Segment("main", 5)]) if kind is SelfAttention else (x, Spatial(x), memory)
    expected = plain(*inputs)
    assert not calls
    for one in (fast, again):
        torch.testing.assert_close(one(*inputs), expected)
        assert one.load_state_dict(plain.state_dict()).missing_keys == []
    assert len(calls) == 2 * (3 if kind is SelfAttention else 4)


def test_layers_of_other_classes_stay() -> None:
    class Doubled(nn.Linear):
        pass

    layer = Doubled(4, 3)
    accelerate(layer)
    assert type(layer) is Doubled


def test_only_what_needs_a_gradient_gets_one(calls: list[int]) -> None:
    layer = fast_linear()
    layer.weight.requires_grad_(False)
    layer(torch.randn(5, 4)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert len(calls) == 1  # neither the input's gradient nor the weight's was computed


def test_other_precisions_take_torchs_path(calls: list[int]) -> None:
    layer, x = fast_linear(), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.double()(x.double())
    assert not calls


@pytest.mark.parametrize(("processor", "faster"), [("GenuineIntel", False), ("AuthenticAMD", True)])
def test_intels_processors_keep_torchs_product(
    processor: str, faster: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux names them, and as Windows does."""
    monkeypatch.setattr(module.Path, "read_text", lambda _: f"vendor_id : {processor}")
    assert FASTER() is faster
    monkeypatch.setattr(module.Path, "read_text", missing)
    monkeypatch.setattr(module.platform, "processor", lambda: f"Intel64 Family 6, {processor}")
    assert FASTER() is faster
    monkeypatch.setattr(module, "_faster", FASTER)
    fast_linear()(torch.randn(5, 4))
    assert bool(calls) is faster


def test_looking_for_the_product_draws_nothing() -> None:
    before = torch.get_rng_state()
    module._available.__wrapped__()
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_or_wrong_products_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (lambda *_: 1 / 0, lambda x, weight, bias: x @ weight.t()):
        monkeypatch.setattr(module, "_product", broken)
        module._available.cache_clear()
        assert not module._available()
    module._available.cache_clear()


def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORTH", 1)
    layer, x = fast_linear(), torch.randn(5, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
