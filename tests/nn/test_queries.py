"""Where queries come from: anchors, their patterns, and centres that stay where they are."""

from __future__ import annotations

import pytest
import torch

from detrellis.nn.queries import AnchorQueries
from detrellis.recipes.build import build
from detrellis.types import Memory

from ..small import CLASSES, images, small, targets

MEMORY = Memory(torch.zeros(2, 1, 8), torch.zeros(1, 1, 8), ((1, 1),))


def test_each_pattern_stands_with_each_anchor() -> None:
    module = AnchorQueries(8, 3, patterns=2)
    queries, proposals = module(MEMORY)
    assert proposals is None
    assert queries.boxes is not None
    assert queries.content.shape == (2, 6, 8)
    assert module.content is not None
    for i in range(6):
        assert torch.equal(queries.content[0, i], module.content[i // 3])
        assert torch.equal(queries.boxes[1, i, :2], module.centres[i % 3].sigmoid())
        assert torch.equal(queries.boxes[1, i, 2:], module.sizes[i % 3].sigmoid())


def test_fixed_centres_are_spread_evenly_and_never_move() -> None:
    torch.manual_seed(0)
    centres = AnchorQueries(8, 2000, fixed_centres=True).centres.sigmoid()
    assert float(centres.mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.histc(centres.detach(), 10, 0, 1).min() > 300

    model = build(small("dab_detr_r50").override(["detector.queries.fixed_centres=true"]), CLASSES)
    before = {k: v.clone() for k, v in model.detector.queries.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
    )
    torch.stack(list(model(images(), targets((2, 3))).losses.values())).sum().backward()
    optimizer.step()
    after = model.detector.queries.state_dict()
    assert torch.equal(before["centres"], after["centres"])
    assert not torch.equal(before["sizes"], after["sizes"])


def test_frozen_anchors_are_drawn_as_learned_ones() -> None:
    for fixed_centres in (False, True):
        drawn = []
        for frozen in (False, True):
            torch.manual_seed(0)
            drawn.append(
                AnchorQueries(8, 5, contents=1, fixed_centres=fixed_centres, frozen=frozen)
            )
        learned, frozen_ones = drawn
        for name, tensor in learned.state_dict().items():
            assert torch.equal(tensor, frozen_ones.state_dict()[name])
        assert [n for n, p in frozen_ones.named_parameters() if p.requires_grad] == ["content"]
        assert not any(p.requires_grad for p in frozen_ones.fresh(3).values())
