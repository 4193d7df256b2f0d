"""The encoder that refines the salient tokens alone: what it chooses, and what it leaves as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detrellis.nn.neck import flatten
from detrellis.nn.position import SineMap
from detrellis.nn.salience import SalienceEncoder, enlarged
from detrellis.recipes.build import build
from detrellis.types import Memory

from ..small import CLASSES, small


def memory(*, padded: bool) -> Memory:
    """Two levels, 4x6 and 2x3 tokens; of the second image half the width is padding, if any is."""
    torch.manual_seed(0)
    padding = torch.zeros(2, 32, 48, dtype=torch.bool)
    padding[1, :, 24:] = True
    levels = [torch.randn(2, 64, 4, 6), torch.randn(2, 64, 2, 3)]
    return flatten(levels, padding if padded else None, SineMap(64, temperature=10000.0, offset=0.0))


def test_scores_are_enlarged_corner_on_corner() -> None:
    scores, where = torch.randn(2, 6), memory(padded=False)
    expected = F.interpolate(scores.view(2, 1, 2, 3), size=(4, 6), mode="bilinear", align_corners=True)
    torch.testing.assert_close(enlarged(scores, 0, where), expected.flatten(1))


@pytest.mark.parametrize(("shares", "counts"), [((0.5, 1.0), (12 + 6, 6 + 4)), (0.5, (15, 8))])
def test_each_image_keeps_its_part_of_each_level_or_of_all(
    shares: tuple[float, ...] | float, counts: tuple[int, int]
) -> None:
    where = memory(padded=True)
    assert where.padding is not None
    encoder = SalienceEncoder([], [], 64, 2, of_levels=shares, of_layers=(1.0,), background=False)
    salience = torch.randn(2, 30)
    kept = encoder.keep(salience, where)
    assert kept.counts is not None
    assert kept.counts.flatten().tolist() == list(counts)
    for image, count in enumerate(counts):
        chosen = kept.order[image, :count]
        assert not where.padding[image, chosen].any()
        assert salience[image, chosen].diff().le(0).all()  # best first
        if isinstance(shares, tuple):
            assert (chosen < 24).sum() == int(0.5 * (~where.padding[image, :24]).sum())


def test_what_is_not_kept_stays_as_it_is() -> None:
    recipe = small("salience_detr_r50").override(
        ["detector.encoder.background=false", "detector.encoder.of_levels=0.2"]
    )
    recipe = recipe.override(["detector.backbone.strides=[8, 16]", "detector.encoder.levels=2"])
    detector = build(recipe, CLASSES).detector.eval()
    start = memory(padded=True)
    with torch.no_grad():
        end = detector.encoder(start, detector.queries.head)
        kept = detector.encoder.keep(end.salience, start)
    assert kept.counts is not None
    changed = (end.tokens != start.tokens).any(-1)
    for image, count in enumerate(kept.counts.int().flatten().tolist()):
        assert set(changed[image].nonzero().flatten().tolist()) == set(kept.order[image, :count].tolist())
