"""The bias that self-attention reads off boxes."""

from __future__ import annotations

import pytest
import torch

from detrellis.errors import UserError
from detrellis.nn.attention import segmented_attention
from detrellis.nn.relation import PositionRelation
from detrellis.recipes.build import build
from detrellis.types import Segment

from ..small import CLASSES, images, small, targets


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.rand(2, count, 4, generator=torch.Generator().manual_seed(seed)) * 0.4 + 0.2


def test_each_block_gets_a_bias_of_its_own_that_attention_adds() -> None:
    """As a square bias over all queries,
    with nothing where two do not see each other, would give.
    """
    torch.manual_seed(0)
    relation, boxes = PositionRelation(4), (rows(18, 0), rows(18, 1))
    segments = [
        Segment("main", 6),
        Segment("dn", 4, 2, ("main",), repeats=True),
        Segment("more", 8, 2),
    ]
    q, k, v = (torch.randn(2, 4, 18, 8) for _ in range(3))
    attended = segmented_attention(q, k, v, relation.related(segments, *boxes))
    place = torch.tensor([0] * 6 + [1, 1, 2, 2] + [3] * 4 + [4] * 4)
    sees = (place[:, None] == place) | (((place == 1) | (place == 2))[:, None] & (place == 0))
    bias = relation.bias(*boxes).masked_fill(~sees, -torch.inf)
    expected = (q @ k.transpose(2, 3) / 8**0.5 + bias).softmax(-1) @ v
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=0)
    assert relation.related([Segment("many", 18, repeats=True)], *boxes)[0].bias is None


def test_the_bias_counts_from_the_second_layer_on() -> None:
    recipe = small("tiny", ["none", "cdn", "group=2"]).override("detector.decoder.relation=true")
    model = build(recipe, CLASSES, seed=0)
    losses = torch.stack(list(model(images(), targets((2, 3))).losses.values()))
    losses.sum().backward()
    decoder = model.detector.decoder.eval()
    assert isinstance(decoder.relation, PositionRelation)
    gradient = decoder.relation.projection.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        step = model.begin(images(), targets((2, 3)))
        before = model.detector.decode(step.memory, {Segment("main", 12): step.queries})[
            "main"
        ].logits
        decoder.relation.projection.weight.normal_()
        after = model.detector.decode(step.memory, {Segment("main", 12): step.queries})[
            "main"
        ].logits
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    "name", ["deformable_detr_r50_refine", "detr_r50", "sam_detr_r50", "mask2former_r50"]
)
def test_boxes_that_do_not_exist_are_not_compared(name: str) -> None:
    recipe = small(name, ["none"])
    if recipe.detector.queries.kind == "anchors":
        recipe = recipe.override("detector.decoder.refine=none")
    with pytest.raises(UserError, match=r"decoder\.relation"):
        build(recipe.override("detector.decoder.relation=true"), CLASSES)
