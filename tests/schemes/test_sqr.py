"""Selective query recollection: which sets each layer gets, and what a layer makes of them."""

from __future__ import annotations

import pytest
import torch

from detrellis.errors import UserError
from detrellis.matching import Hungarian
from detrellis.nn.decoder import Decoder
from detrellis.recipes.build import build

from ..contract.models import begin, decoded
from ..small import CLASSES, small


@torch.no_grad()
def test_layers_get_what_the_two_before_them_handed_on() -> None:
    model = build(
        small("dino_r50").with_schemes(["none", "sqr"]).override("detector.decoder.layers=6"),
        CLASSES,
    )
    step = begin(model)
    output = decoded(model.detector, step.memory)
    scheme = model.training_schemes[0]
    tasks = scheme.after(step, {"main": output})
    # And the main one: 2, 3, 5, 8, 13
    assert [task.match.copies for task in tasks] == [1, 2, 4, 7, 12]
    assert [len(task.match.output.boxes) for task in tasks] == [1] * 5


@torch.no_grad()
def test_layers_are_matched_as_the_main_set_is_there() -> None:
    """With several queries for each object in all layers but the last."""
    model = build(
        small("dino_r50")
        .with_schemes(["none", "align=4", "sqr"])
        .override("detector.decoder.layers=3"),
        CLASSES,
    )
    step = begin(model)
    (scheme,) = (scheme for scheme in model.training_schemes if scheme.name == "sqr")
    tasks = scheme.after(step, {"main": decoded(model.detector, step.memory)})
    rules = [task.match.assign for task in tasks]
    assert [rule.candidates.last for rule in rules if isinstance(rule, Hungarian)] == [4, 1]


@pytest.mark.parametrize("name", ["tiny", "deformable_detr_r50", "conditional_detr_r50"])
@torch.no_grad()
def test_a_layer_makes_of_the_main_set_what_it_made_of_it(name: str) -> None:
    model = build(small(name, ["none"]), CLASSES)
    step, decoder = begin(model), model.detector.decoder
    assert isinstance(decoder, Decoder)
    output = decoded(model.detector, step.memory)
    # Beside another set, which it must not see.
    other = output.passed[0].map(lambda t: t.roll(1, 1) * 0.9)
    again, (_, passed) = decoder.again(1, [other, output.passed[0]], step.queries, step.memory)
    count = step.queries.content.shape[1]
    torch.testing.assert_close(again.logits[0, :, count:], output.logits[1], atol=1e-9, rtol=0)
    torch.testing.assert_close(again.boxes[0, :, count:], output.boxes[1], atol=1e-9, rtol=0)
    torch.testing.assert_close(passed.states, output.passed[1].states, atol=1e-9, rtol=0)


@pytest.mark.parametrize("part", ["distinct=0.7", "ranked=true", "relation=true"])
def test_layers_that_hand_on_more_are_refused(part: str) -> None:
    recipe = small("tiny").with_schemes(["sqr"]).override(f"detector.decoder.{part}")
    with pytest.raises(UserError, match="scheme sqr cannot train"), torch.device("meta"):
        build(recipe, CLASSES)
