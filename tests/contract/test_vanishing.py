"""Invariant 1 of docs/architecture.md: keys, multiply-adds and outputs are those of a detector without schemes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..small import images, targets
from .models import every_stack, flat, make, make_plain, train_step

pytestmark = pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")  # stacks of two that do the same work


@every_stack
def test_no_scheme_is_in_the_detector(name: str, stack: str) -> None:
    model, plain = make(name, stack), make_plain(name, stack)
    assert list(model.detector.state_dict()) == list(plain.detector.state_dict())
    train_step(model, images(), targets((2, 3)))
    plain.detector.load_state_dict(model.detector.state_dict())
    model.eval()
    plain.eval()
    counts, outputs = [], []
    for detector in (model.detector, plain.detector):
        detector.requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            outputs.append(flat(detector(images())))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert torch.equal(*outputs)
