"""Rank-DETR's loss and matching beside the base's."""

from __future__ import annotations

from detrellis.matching import Hungarian, MatchingCost
from detrellis.recipes.build import build
from detrellis.schemes.config import RankConfig
from detrellis.schemes.rank import GIOU_AWARE, HighOrderCost, Rank
from detrellis.supervision import Supervision

from ..small import CLASSES, images, small, targets


def test_the_cost_changes_at_its_part_of_the_run() -> None:
    scheme, base = Rank(RankConfig(after=0.5, power=3.0)), Supervision()
    for done, late in ((0.0, False), (0.49, False), (0.5, True), (0.9, True), (0.1, False)):
        scheme.progress(done)
        assign = scheme.supervision(base).assign
        assert isinstance(assign, Hungarian)
        assert assign.cost == (HighOrderCost(power=3.0) if late else MatchingCost())


def test_proposals_keep_the_loss_of_the_base() -> None:
    base = Supervision()
    ranked = Rank(RankConfig()).supervision(base)
    assert ranked.rule == GIOU_AWARE
    assert ranked.proposals().rule is base.rule


def test_a_model_hands_its_progress_on() -> None:
    model = build(small("tiny", ["none", "rank"]), CLASSES, seed=0).eval()
    losses = []
    for done in (0.0, 0.74, 0.75):
        model.progress(done)
        losses.append({k: v.item() for k, v in model(images(), targets((2, 3))).losses.items()})
    assert losses[0] == losses[1] != losses[2]
