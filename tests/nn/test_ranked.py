"""Queries that know how they rank, and queries that read the cells in their boxes alone."""

from __future__ import annotations

import pytest
import torch

from detrellis.errors import UserError
from detrellis.nn.ranked import RankLayers, places_of, ranks_of
from detrellis.nn.spatial import cells_within
from detrellis.recipes.build import build
from detrellis.types import Segment

from ..small import CLASSES, images, small, targets

SEGMENTS = [Segment("main", 3), Segment("group", 8, 2)]


def test_ranks_are_of_each_copy_by_itself() -> None:
    logits = torch.tensor([1.0, 3, 2, 5, 6, 7, 8, 4, 4, 9, 4]).view(1, 11, 1).repeat(1, 1, 2)
    logits[0, 0, 1] = 9  # the best class counts
    assert ranks_of(logits, SEGMENTS, 100).tolist() == [[0, 1, 2, 3, 2, 1, 0, 1, 2, 0, 3]]
    assert ranks_of(logits, SEGMENTS, 3).tolist() == [[0, 1, 2, 2, 2, 1, 0, 1, 2, 0, 2]]
    assert places_of(SEGMENTS, 3, logits.device).tolist() == [[0, 1, 2, 0, 1, 2, 2, 0, 1, 2, 2]]


def test_they_are_what_sorted_queries_would_give() -> None:
    """The paper sorts the queries and adds the rows in order."""
    torch.manual_seed(0)
    layers = RankLayers(2, 6, 8, CLASSES)
    for rows in (*layers.logits, *layers.contents):
        torch.nn.init.normal_(rows)
    x, logits = torch.randn(2, 6, 8), torch.randn(2, 6, CLASSES)
    ranks = layers.next(logits, [Segment("main", 6)])
    order = logits.amax(-1).argsort(dim=1, descending=True)
    for image in range(2):
        rows = layers.embed[0](layers.contents[0])
        expected = layers.mix[0](torch.cat([x[image, order[image]], rows], dim=-1))
        torch.testing.assert_close(layers.content(1, x, ranks)[image, order[image]], expected)
        expected = logits[image, order[image]] + layers.logits[1]
        torch.testing.assert_close(layers.score(1, logits, ranks)[image, order[image]], expected)


@pytest.mark.parametrize("name", ["dab_detr_r50", "cascade_dino_r50"])
def test_queries_read_the_cells_in_their_boxes_alone(name: str) -> None:
    recipe = small(name).override(
        ["detector.cross_attention.within_boxes=true", "detector.decoder.layers=1", "data.size=256"]
    )
    model = build(recipe, CLASSES, seed=0).eval()
    with torch.no_grad():
        step = model.begin(images(((256, 256), (256, 192))), targets((2, 3)))
        assert step.queries.boxes is not None
        readable = cells_within(step.queries.boxes, step.memory)
        assert step.memory.padding is not None
        assert not (readable & step.memory.padding.unsqueeze(1)).any()
        assert readable.any(-1).all()
        tokens = step.memory.tokens.clone()
        cell = (readable[0].sum(0) - 6).abs().argmin()
        tokens[0, cell] += 1
        segment = Segment("main", 12)
        before, after = (
            model.detector.decode(memory, {segment: step.queries})["main"].logits[-1]
            for memory in (step.memory, step.memory._replace(tokens=tokens))
        )
    changed = (before != after).any(-1)
    assert not changed[1].any()
    assert changed[0].tolist() == readable[0, :, cell].tolist()
    assert 0 < changed[0].sum() < 12


@pytest.mark.parametrize(
    ("name", "field", "reason"),
    [
        ("conditional_detr_r50", "cross_attention.within_boxes", "has points"),
        ("detr_r50", "decoder.ranked", "scores=softmax"),
        ("mask2former_r50", "decoder.ranked", "decoder.ranked"),
        ("dfine_s", "decoder.ranked", "decoder.distributions"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, field: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build(small(name, ["none"]).override(f"detector.{field}=true"), CLASSES)
