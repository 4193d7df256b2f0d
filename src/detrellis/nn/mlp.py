"""Linear layers with the transformer's initialisation,
the MLP of all heads, and the feed-forward block.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.nn.pieces import in_pieces, overwrites

Activation = Literal["relu", "prelu", "gelu", "silu"]


class InPlaceReLU(nn.ReLU):
    """Of what nobody else has: see `overwrites`."""

    def forward(self, x: Tensor) -> Tensor:
        """`x`, or a tensor like it."""
        return F.relu(x, inplace=overwrites())


class InPlaceSiLU(nn.SiLU):
    """Of what nobody else has: see `overwrites`."""

    def forward(self, x: Tensor) -> Tensor:
        """`x`, or a tensor like it."""
        return F.silu(x, inplace=overwrites())


ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": InPlaceReLU,
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
    "silu": InPlaceSiLU,
}


def xavier_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer as DETR's transformer initialises it:
    Xavier-uniform weight, PyTorch's bias.
    """
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    return layer


class MLP(nn.Module):
    """`depth` linear layers with ReLU between: `inputs -> hidden -> ... -> outputs`.

    `xavier` initialises the weights as part of the transformer; heads outside it keep PyTorch's
    initialisation.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int, depth: int, *, xavier: bool = False
    ) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (depth - 1), outputs]
        make = xavier_linear if xavier else nn.Linear
        self.layers = nn.ModuleList(make(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs `(..., outputs)` of `x (..., inputs)`."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=overwrites())
        out: Tensor = self.layers[-1](x)
        return out


class FeedForward(nn.Module):
    """Post-norm feed-forward block with its residual: `LN(x + W2 act(W1 x))`.

    `activation`: `"relu"` in most papers; `"prelu"` with one slope in DAB-DETR; the others in
    nobody's but users' own.
    """

    def __init__(
        self, width: int, hidden: int, *, dropout: float = 0.0, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.inner = xavier_linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.outer = xavier_linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs `(B, N, D)` of `x (B, N, D)`."""
        return in_pieces(self._transform, x, width=self.inner.out_features)

    def _transform(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.inner(x)))
        out: Tensor = self.norm(x + self.dropout(self.outer(hidden)))
        return out
