"""The encoder that refines the salient tokens alone:
what it chooses, and what it leaves as it is.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detrellis.nn.distinct import overlapping
from detrellis.nn.neck import flatten
from detrellis.nn.position import SineMap
from detrellis.nn.proposals import cell_boxes
from detrellis.nn.salience import BackgroundEmbedding, SalienceEncoder, enlarged
from detrellis.recipes.build import build
from detrellis.salience import salience_loss
from detrellis.types import Memory

from ..small import CLASSES, small, targets


def memory(*, padded: bool) -> Memory:
    """Two levels, 4x6 and 2x3 tokens; of the second image half the width is padding, if any is."""
    torch.manual_seed(0)
    padding = torch.zeros(2, 32, 48, dtype=torch.bool)
    padding[1, :, 24:] = True
    levels = [torch.randn(2, 64, 4, 6), torch.randn(2, 64, 2, 3)]
    return flatten(
        levels, padding if padded else None, SineMap(64, temperature=10000.0, offset=0.0)
    )


def test_scores_are_enlarged_corner_on_corner() -> None:
    scores, where = torch.randn(2, 6), memory(padded=False)
    expected = F.interpolate(
        scores.view(2, 1, 2, 3), size=(4, 6), mode="bilinear", align_corners=True
    )
    torch.testing.assert_close(enlarged(scores, 0, where), expected.flatten(1))


@pytest.mark.parametrize(("ratios", "counts"), [((0.5, 1.0), (12 + 6, 6 + 4)), (0.5, (15, 8))])
def test_each_image_keeps_its_part_of_each_level_or_of_all(
    ratios: tuple[float, ...] | float, counts: tuple[int, int]
) -> None:
    where = memory(padded=True)
    assert where.padding is not None
    encoder = SalienceEncoder(
        [], [], 64, 2, level_ratios=ratios, layer_ratios=(1.0,), background=False
    )
    salience = torch.randn(2, 30)
    kept = encoder.keep(salience, where)
    assert kept.counts is not None
    assert kept.counts.flatten().tolist() == list(counts)
    for image, count in enumerate(counts):
        chosen = kept.order[image, :count]
        assert not where.padding[image, chosen].any()
        assert salience[image, chosen].diff().le(0).all()  # best first
        if isinstance(ratios, tuple):
            assert (chosen < 24).sum() == int(0.5 * (~where.padding[image, :24]).sum())


def test_what_is_not_kept_stays_as_it_is() -> None:
    recipe = small("salience_detr_r50").override(
        ["detector.encoder.background=false", "detector.encoder.level_ratios=0.2"]
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
        assert set(changed[image].nonzero().flatten().tolist()) == set(
            kept.order[image, :count].tolist()
        )


def test_what_the_last_layer_does_not_refine_gets_the_background() -> None:
    """Even where an earlier layer has refined it; padding never."""
    changes = ["detector.encoder.level_ratios=0.8", "detector.encoder.layer_ratios=[1.0, 0.5]"]
    changes += [
        "detector.backbone.strides=[8, 16]",
        "detector.encoder.levels=2",
        "detector.encoder.layers=2",
    ]
    detector = build(small("salience_detr_r50").override(changes), CLASSES).detector.eval()
    encoder, start = detector.encoder, memory(padded=True)
    assert isinstance(encoder, SalienceEncoder)
    assert isinstance(encoder.background, BackgroundEmbedding)
    assert start.padding is not None
    with torch.no_grad():
        end = encoder(start, detector.queries.head)
        table = encoder.background(start.shapes)
        encoder.background = None
        added = end.tokens - encoder(start, detector.queries.head).tokens
        kept = encoder.keep(end.salience, start)
    assert kept.counts is not None
    for image, count in enumerate((0.5 * kept.counts).int().flatten().tolist()):
        left = ~start.padding[image]
        left[kept.order[image, :count]] = False
        torch.testing.assert_close(added[image], table * left.unsqueeze(-1))


def test_neighbouring_cells_of_a_level_overlap() -> None:
    """Of a map of 4x6 and one of 2x3 cells:
    (0, 1) and (1, 1) are near (0, 0); the other level's first cell is not.
    """
    tokens = torch.tensor([0, 1, 7, 2, 24])
    boxes = cell_boxes(memory(padded=False))[:, tokens]
    assert overlapping(boxes, 0.3).tolist() == [[False, True, False, False, False]]
    assert overlapping(boxes, 0.1).tolist() == [[False, True, True, False, False]]


def test_padding_learns_nothing() -> None:
    where, truth = memory(padded=True), targets((2, 3))
    assert where.padding is not None
    salience, sizes = torch.randn(2, 30), torch.tensor([[32, 48], [32, 24]])
    losses = [
        salience_loss(
            where._replace(salience=salience.masked_fill(where.padding, value)),
            truth,
            sizes,
            lambda x: x,
        )
        for value in (-9.0, 9.0)
    ]
    assert losses[0] == losses[1]
