"""Activation checkpointing: every network computes the same bits and keeps less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detrellis.nn.recompute import Recomputable
from detrellis.recipes.build import build
from detrellis.types import Targets

from ..small import CLASSES, NETWORKS, images, small, targets, with_bitmaps

DROPOUT = "detector.dropout=0.1"  # is drawn again alike


def step(name: str, checkpointing: bool) -> tuple[list[Tensor], int]:
    """Losses and gradients of a step, and the bytes that its forward pass keeps."""
    recipe = small(name).override([DROPOUT, f"optim.checkpointing={str(checkpointing).lower()}"])
    model = build(recipe, CLASSES).train()
    assert any(isinstance(m, Recomputable) and m.recomputed for m in model.modules()) == (
        checkpointing
    )
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    pictures, boxes = images(), targets((2, 3))
    given: Targets = boxes if recipe.detector.masks is None else with_bitmaps(boxes, pictures)
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = torch.stack(list(model(pictures, given).losses.values()))
    losses.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 20
    return [losses, *gradients], sum(kept.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_computes_the_same_bits(name: str) -> None:
    (plain, bytes_plain), (again, bytes_again) = (step(name, on) for on in (False, True))
    assert len(plain) == len(again)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
    assert bytes_again < bytes_plain
