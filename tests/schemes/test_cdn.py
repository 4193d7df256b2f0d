"""Contrastive denoising: what is disturbed, by how much, and that only the seed decides."""

from __future__ import annotations

import pytest
import torch

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.errors import UserError
from detrellis.recipes.build import build
from detrellis.schemes.cdn import ContrastiveDenoising, disturb, draw_noise, group_count
from detrellis.schemes.config import CDNConfig
from detrellis.schemes.denoising import lay_out, positives

from ..small import CLASSES, images, small, targets


@pytest.mark.parametrize(
    ("number", "most", "groups"),
    [
        (100, 0, 1),
        (100, 4, 25),
        (100, 7, 14),
        (100, 150, 1),
        (50, 10, 5),
        (49, 10, 98),
        (6, 3, 12),
        (1, 9, 2),
    ],
)
def test_group_count(number: int, most: int, groups: int) -> None:
    assert group_count(number, most) == groups


def test_positives_stay_near_and_negatives_go_farther() -> None:
    truth = targets((300,), side=0.2)
    truth.boxes[:, :2] = 0.5
    layout = lay_out(truth, 4, 2)
    noise = draw_noise(len(layout.slot), CLASSES, torch.Generator().manual_seed(0))
    _, boxes = disturb(truth, layout, noise, flip=0.0, scale=1.0)
    moved = (cxcywh_to_xyxy(boxes) - cxcywh_to_xyxy(truth.boxes[layout.target])).abs() / 0.1
    near, far = moved[layout.positive], moved[~layout.positive]
    assert near.max() <= 1 + 1e-5
    assert near.mean() == pytest.approx(0.5, abs=0.03)
    assert far.min() >= 1 - 1e-5
    assert far.max() <= 2 + 1e-5


def test_a_quarter_of_the_labels_is_replaced_at_the_default() -> None:
    truth = targets((2000,))
    truth = truth._replace(labels=torch.zeros_like(truth.labels))
    layout = lay_out(truth, 1, 2)
    noise = draw_noise(len(layout.slot), 1000, torch.Generator().manual_seed(0))
    labels, _ = disturb(truth, layout, noise, flip=0.5 / 2, scale=0.0)
    assert (labels != 0).float().mean() == pytest.approx(0.25, abs=0.03)


def test_every_positive_knows_its_own_target_at_every_layer() -> None:
    truth = targets((2, 0, 3))
    layout = lay_out(truth, 4, 2)
    known = positives(layout, 3)
    assert layout.slots == 4 * 2 * 3
    assert len(known.query) == 3 * 4 * 5
    for image, query, target in zip(
        known.image.tolist(), known.query.tolist(), known.target.tolist(), strict=True
    ):
        assert query % 6 == target - truth.offsets[image]


def test_empty_slots_are_neutral() -> None:
    scheme = ContrastiveDenoising(CDNConfig(), 8, CLASSES, 1e-3)
    truth = targets((1, 3))
    layout = lay_out(truth, 2, 2)
    queries = scheme.queries(
        truth, layout, draw_noise(len(layout.slot), CLASSES, torch.Generator())
    )
    used = torch.zeros(2, layout.slots, dtype=torch.bool)
    used[layout.image, layout.slot] = True
    assert used.sum() == 2 * 2 * 4
    assert queries.boxes is not None
    assert (queries.content[~used] == 0).all()
    assert (queries.boxes[~used] == 0.5).all()
    assert (queries.content[used] != 0).any(-1).all()


def test_the_seed_alone_decides() -> None:
    model = build(small("tiny"), CLASSES).eval()
    truth = targets((2, 3))

    def losses(seed: int) -> list[float]:
        torch.manual_seed(torch.seed() % 1000)
        model.reseed(seed)
        return [float(v.detach()) for v in model(images(), truth).losses.values()]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_detectors_without_box_queries_are_refused_by_name() -> None:
    with pytest.raises(
        UserError, match=r"cdn cannot train deformable-detr-r50:.*queries are not boxes"
    ) as error:
        build(small("deformable_detr_r50", ["cdn"]), CLASSES)
    assert "dino-r50" in error.value.remedy
