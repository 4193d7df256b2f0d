"""Losses over a sample of the classes, in every block and head."""

from __future__ import annotations

import pytest
import torch

from detrellis.data.masks import SIDE
from detrellis.recipes.build import build
from detrellis.schemes.config import FederatedConfig
from detrellis.schemes.federated import Federated
from detrellis.types import Targets

from ..small import CLASSES, images, small, targets

NONE = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (0,))


def of(*labels: int) -> Targets:
    return NONE._replace(
        labels=torch.tensor(labels), boxes=torch.zeros(len(labels), 4), sizes=(len(labels),)
    )


def test_classes_of_the_batch_always_count() -> None:
    scheme = Federated(FederatedConfig(classes=3), 10)
    scheme.count_classes(torch.tensor([100, 100, 100, 100, 1, 0, 0, 0, 0, 0]))
    for seed in range(20):
        scheme.reseed(seed)
        columns = scheme.columns(of(9, 8, 9))
        assert columns.sum() == 3
        assert columns[[8, 9]].all()
        assert not columns[5:8].any()  # no image has them
    assert scheme.columns(of(*range(6))).tolist() == [True] * 6 + [False] * 4
    assert scheme.columns(NONE).sum() == 3


def test_steps_draw_anew_and_again() -> None:
    scheme = Federated(FederatedConfig(classes=5), 40)
    drawn = []
    for seed in (1, 2, 1):
        scheme.reseed(seed)
        drawn.append(scheme.columns(NONE))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    "schemes",
    [
        ("align",),
        ("hybrid=2",),
        ("group=2",),
        ("co=atss+rcnn",),
        ("co=mask",),
        ("co=paa+gfl", "align"),
        ("dense", "stable"),
    ],
)
def test_classes_that_do_not_count_get_no_gradient(schemes: tuple[str, ...]) -> None:
    model = build(small("tiny", [*schemes, "federated=1"]), CLASSES, seed=0)
    truth = targets((1, 2))
    masks = torch.ones(3, SIDE, SIDE, dtype=torch.bool)  # for Mask R-CNN's head
    truth = truth._replace(labels=torch.ones_like(truth.labels), masks=masks)
    model.reseed(0)
    sum(model(images(), truth).losses.values(), torch.zeros(())).backward()
    heads = {
        name: p.grad
        for name, p in model.named_parameters()
        if p.grad is not None and p.shape[0] in (CLASSES, CLASSES + 1) and name.endswith("bias")
    }
    assert any("decoder.heads.classes" in name for name in heads)
    assert any(len(gradient) == CLASSES + 1 for gradient in heads.values()) == (
        not {"co=atss+rcnn", "co=mask"}.isdisjoint(schemes)
    )
    for name, gradient in heads.items():
        assert gradient[1] != 0, name
        assert not gradient[[c for c in range(CLASSES) if c != 1]].any(), name
