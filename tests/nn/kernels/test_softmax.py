"""Softmax of short rows: the same numbers as torch's, and one operation in graphs."""

import pytest
import torch
from torch import Tensor, nn

from detrellis.nn.kernels import softmax as module
from detrellis.nn.kernels.softmax import softmax


@pytest.fixture(params=[0, 8, 16])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "_lanes", lambda: request.param)
    return int(request.param)


@pytest.mark.parametrize("shape", [(2, 5, 3, 12), (7, 4), (2, 0, 3, 12), (2, 5, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_and_gradients_are_torchs(
    lanes: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2))
    results = []
    for function in (softmax, lambda x: x.softmax(-1)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        (gradient,) = torch.autograd.grad((out * weights).sum(), leaf)
        results.append((out, gradient))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_large_logits_stay_finite(lanes: int) -> None:
    out = softmax(torch.tensor([[1e4, -1e4, 1e4]]))
    torch.testing.assert_close(out, torch.tensor([[0.5, 0.0, 0.5]]))


@pytest.mark.parametrize(("points", "across"), [(12, True), (16, False)])
def test_short_rows_alone_are_taken_across(
    monkeypatch: pytest.MonkeyPatch, points: int, across: bool
) -> None:
    monkeypatch.setattr(module, "_lanes", lambda: 16)
    out = softmax(torch.randn(9, points))
    assert out.is_contiguous() != across


class _Weights(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return softmax(x)


def test_graphs_have_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_lanes", lambda: 16)
    graph = torch.export.export(_Weights(), (torch.randn(9, 12),)).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == ["aten.softmax.int"]
