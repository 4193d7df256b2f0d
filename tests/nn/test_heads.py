"""The IoU branch: learned where there are positives,
part of the score at inference, in every base with sigmoids.
"""

from __future__ import annotations

import pytest
import torch

from detrellis.errors import UserError
from detrellis.interop.huggingface import family_of
from detrellis.recipes.build import build
from detrellis.set_loss import SetLoss, squared_error

from ..small import CLASSES, images, small, targets, with_own_backbone

NAMES = (
    "tiny",
    "conditional_detr_r50",
    "dab_detr_r50",
    "dn_detr_r50",
    "h_deformable_detr_r50",
    "align_dino_r50",
)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_with_every_block(name: str) -> None:
    model = build(small(name).override("detector.iou_branch=root"), CLASSES)
    losses = model(images(), targets((2, 3))).losses
    blocks = {k.split("/")[0] for k in losses} - {"proposals", "schemes"}
    assert {k for k in losses if "iou_branch" in k} == {
        f"{b}/iou_branch/{layer}" for b in blocks for layer in (0, 1)
    }
    torch.stack([v for k, v in losses.items() if "iou_branch" in k]).sum().backward()
    branch = [p for n, p in model.named_parameters() if ".ious." in n]
    assert branch
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branch)
    model.zero_grad()
    nothing = model(images(), targets((0, 0))).losses
    torch.stack(list(nothing.values())).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in branch)


@torch.no_grad()
def test_scores_hold_it() -> None:
    found, sizes = {}, torch.tensor([[64, 96]] * 2)
    for kind in ("none", "product", "root"):
        detector = build(
            small("tiny").override(f"detector.iou_branch={kind}"), CLASSES
        ).detector.eval()
        output = detector(images())
        found[kind] = detector.postprocess.scores(output)
        best = found[kind].flatten(1).sort(descending=True).values[:, :20]
        assert torch.equal(torch.stack([d.scores for d in detector.detect(images(), sizes)]), best)
    # A head more draws from the same generator, so the weights of the three differ; those of the
    # last two do not.
    torch.testing.assert_close(found["root"] ** 2, found["product"])
    assert not torch.allclose(found["none"], found["product"])


def test_transformers_has_none() -> None:
    with pytest.raises(UserError, match="iou_branch"):
        family_of(
            with_own_backbone("conditional_detr_r50")
            .override("detector.iou_branch=product")
            .detector
        )


@pytest.mark.parametrize("scheme", ["none", "align", "rank", "stable"])
def test_the_branch_learns_by_the_error_that_is_named(scheme: str) -> None:
    recipe = small("tiny", ["none", scheme]).override(
        ["detector.iou_branch=product", "loss.iou_error=l2"]
    )
    with torch.device("meta"):
        rule = build(recipe, CLASSES).supervision.rule
    assert isinstance(rule, SetLoss)
    assert rule.iou_error is squared_error


def test_the_squared_error_is_that_of_probabilities() -> None:
    assert squared_error(torch.tensor([0.0, 0.0]), torch.tensor([0.5, 1.0])).tolist() == [0, 0.25]
