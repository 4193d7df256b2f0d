"""Feed-forward blocks, heads and convolutions with their activations."""

from __future__ import annotations

import pytest
import torch

from detrellis.nn.fusion import ConvNorm, RepConvolution
from detrellis.nn.mlp import MLP, Activation, FeedForward


@pytest.mark.parametrize("activation", ["relu", "prelu", "gelu", "silu"])
def test_activations_overwrite_nothing_that_anybody_has(activation: Activation) -> None:
    """Without gradients they are written over what their layer made, and never over its inputs."""
    torch.manual_seed(0)
    parts = (
        FeedForward(8, 16, activation=activation),
        MLP(8, 16, 8, 3),
        ConvNorm(8, 8, activation=activation),
        RepConvolution(8, activation),
    )
    for part in parts:
        x = torch.randn(2, 8, 8, 8)
        before = x.clone()
        expected = part.eval()(x)
        with torch.no_grad():
            assert torch.equal(part(x), expected)
        assert torch.equal(x, before)
        expected.sum().backward()
