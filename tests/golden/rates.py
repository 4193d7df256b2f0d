"""Learning rates by depth, against Co-DETR's."""

from __future__ import annotations

import torch

from detrellis.engine.optim import layer_factors

from .arrays import Arrays


def check_layer_decay(a: Arrays) -> None:
    """Of a ViT. Its rule for weight decay,
    none for biases and 1-D parameters, is not ours, and is not compared.
    """
    names = [str(name) for name in a.data["names"]]
    factors = layer_factors(names, float(a["rate"]))
    torch.testing.assert_close(
        torch.tensor([factors[name] for name in names], dtype=torch.float64),
        a["scale"],
        rtol=1e-12,
        atol=0,
    )
