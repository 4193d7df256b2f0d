"""Invariant 4 of docs/architecture.md: whatever a batch holds, all is finite, and the same parameters get gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detrellis.recipes.detector import DetectorConfig
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, Targets

from ..small import images, small, targets
from .models import every_stack, make, train_step

pytestmark = pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")  # stacks of two that do the same work


BATCHES: dict[str, tuple[Any, Targets]] = {  # besides a usual one
    "an image without boxes": (((64, 96), (64, 80)), targets((0, 3))),
    "no boxes at all": (((64, 96), (64, 96)), targets((0, 0))),
    "more targets than queries": (((64, 96), (48, 96)), targets((15, 1))),
    "one-pixel boxes": (((64, 96), (64, 96)), targets((2, 2), side=1 / 96)),
    "boxes of no size": (((64, 96), (64, 96)), targets((2, 2), side=0.0)),
    "a batch of one": (((64, 64),), targets((2,))),
}


@every_stack
def test_any_batch_is_finite_and_trains_the_same_parameters(name: str, stack: str) -> None:
    model = make(name, stack)
    for what, (sizes, truth) in BATCHES.items():
        # An all-zero gradient everywhere would satisfy the rest.
        assert any(size > 0 for size in train_on(model, images(sizes), truth, what).values()), what


@every_stack
def test_every_parameter_matters(name: str, stack: str) -> None:
    """On a usual batch, after the heads have left their zero start, no parameter's gradient is zero throughout."""
    model = make(name, stack)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    sizes = train_on(model, images(((64, 96), (64, 80))), targets((3, 4)), "usual")
    idle = {key for key, size in sizes.items() if size == 0}
    filled = any(scheme.name == "co" for scheme in model.training_schemes)  # its queries have contents from the start
    assert idle == (set() if filled else reads_only_zeros(small(name).detector))


def train_on(model: TrainableDetector, batch: ImageBatch, truth: Targets, what: str) -> dict[str, float]:
    """A step in which all is finite and all that is trained gets a gradient; the size of each, by name."""
    losses = train_step(model, batch, truth)
    bad = [k for k, v in losses.items() if not v.isfinite()]
    assert not bad, (what, bad)
    expected = {k for k, p in model.named_parameters() if p.requires_grad}
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected, (what, expected ^ gradients.keys())
    sizes = torch.stack([g.abs().sum() for g in gradients.values()])
    assert sizes.isfinite().all(), what
    return dict(zip(gradients, sizes.tolist(), strict=True))


def reads_only_zeros(detector: DetectorConfig) -> set[str]:
    """A projection of contents alone, in the first layer of a detector whose contents start at 0, cannot learn."""
    zero = detector.queries.kind in ("learned", "anchors") and detector.queries.content == "zero"
    zero = zero and detector.cross_attention.kind in ("conditional", "semantic")
    return {"detector.decoder.layers.0.self_attention.content.weight"} if zero else set()
