"""Stable-DINO's supervision:
targets scaled image by image, weights, and a matching that discounts bad boxes.
"""

from __future__ import annotations

import pytest
import torch

from detrellis.boxes import cxcywh_to_xyxy, iou
from detrellis.matching import Hungarian, Match, assign
from detrellis.pairs import pair_up, scaled_iou_target
from detrellis.recipes.build import build
from detrellis.schemes.config import StableConfig
from detrellis.schemes.stable import Stable, modulation
from detrellis.supervision import Supervision
from detrellis.types import Assignment, DecoderOutput, Targets

from ..small import CLASSES, images, small, targets
from ..test_matching import problem


def test_in_each_layer_and_image_the_best_positive_aims_at_1() -> None:
    output, truth = problem(3, (4, 0, 3), 12)
    near = torch.tensor([0.1, 0.1, 0.5, 0.5])  # all boxes overlap
    output = output._replace(boxes=near * output.boxes + 0.3)
    truth = truth._replace(boxes=near * truth.boxes + 0.3)
    found = assign([Match(output, truth, Hungarian())])[0]
    target = scaled_iou_target(pair_up(output, truth, found)).target
    predicted = output.boxes[found.layer, found.image, found.query]
    square = iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(truth.boxes[found.target])) ** 2
    for layer in range(3):
        for image in (0, 2):
            own = (found.layer == layer) & (found.image == image)
            torch.testing.assert_close(target[own], square[own] / square[own].max())


def test_without_overlap_or_positives() -> None:
    apart = DecoderOutput(
        torch.zeros(1, 1, 2, 3),
        torch.tensor([[[[0.1, 0.1, 0.1, 0.1]] * 2]]),
        torch.zeros(1, 1, 2, 4),
    )
    truth = Targets(torch.tensor([1]), torch.tensor([[0.9, 0.9, 0.1, 0.1]]), (1,))
    found = assign([Match(apart, truth, Hungarian())])[0]
    assert scaled_iou_target(pair_up(apart, truth, found)).target.tolist() == [0]
    nothing = Assignment(*torch.zeros(5, 0, dtype=torch.int64))
    assert scaled_iou_target(pair_up(apart, truth, nothing)).target.shape == (0,)


def test_the_best_modulation_of_an_image_is_1() -> None:
    overlap = torch.tensor([[[-0.5, 0.2], [0.1, -1.0]], [[-0.9, -0.8], [-1.0, -0.95]]])
    found = modulation(overlap)
    assert found.amax((1, 2)).tolist() == [1, 1]
    torch.testing.assert_close(found[0, 0, 0], torch.tensor(0.25 / 0.6))
    assert modulation(torch.full((1, 2, 2), torch.nan)).isfinite().all()


@pytest.mark.parametrize("modulated", [True, False])
def test_of_equal_scores_the_better_box_costs_less(modulated: bool) -> None:
    """Boxes alone decide anyway; the modulation adds to it in the class cost."""
    supervision = Stable(StableConfig(modulated=modulated)).supervision(Supervision())
    assert isinstance(supervision.assign, Hungarian)
    overlap = torch.tensor([[0.9], [-0.5]])
    cost = supervision.assign.cost.class_term(torch.zeros(2, 3), torch.tensor([1]), overlap)
    assert (cost[0] < cost[1]) == modulated


def test_denoising_keeps_weight_1() -> None:
    losses = []
    for schemes in (["stable"], ["stable"]):
        recipe = small("tiny", schemes).override(f"schemes.stable.classes={1 if losses else 6}")
        model = build(recipe, CLASSES).eval()
        model.reseed(0)
        losses.append(model(images(), targets((2, 3))).losses)
    for key, value in losses[1].items():
        times = 6 if key.split("/")[1] == "class" and not key.startswith("cdn") else 1
        torch.testing.assert_close(losses[0][key], times * value)
