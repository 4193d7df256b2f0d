"""Losses and gradients are finite for the most extreme outputs and targets: saturated logits of
classes, of distributions over sides and of masks, boxes of no size, more objects than queries, one
class and 2,000. `tests/soak` takes every stack of schemes through it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detrellis.nn.distribution import Bins, mean_boxes, weighting
from detrellis.nn.heads import Heads
from detrellis.recipes import Recipe
from detrellis.recipes.build import build, build_supervision
from detrellis.set_loss import CLASSIFICATION
from detrellis.supervision import supervise
from detrellis.training import TrainableDetector
from detrellis.types import DecoderOutput, SideDistributions, Targets

from .small import images, small, targets, with_bitmaps

LARGEST = 1e4
OBJECTS = 500
SIDES = torch.tensor([0.0, 1e-7, 1 / 64, 0.3, 1.0])


def crowd(classes: int, sizes: tuple[int, ...] = (OBJECTS, 0)) -> Targets:
    """Boxes of all sides down to none."""
    truth = targets(sizes, side=SIDES.repeat(sum(sizes) // len(SIDES))[:, None])
    return truth._replace(labels=torch.arange(sum(sizes)) % classes)


def saturated(logits: Tensor) -> Tensor:
    """The logits at +-1e4, by their sign; gradients flow as they do."""
    return logits * (LARGEST / logits.detach().abs().clamp(min=1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 2000])
@pytest.mark.parametrize("rule", CLASSIFICATION)
def test_every_loss_rule(rule: str, classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (
        saturated(torch.randn(2, 2, 100, classes, generator=generator)).to(dtype).requires_grad_()
    )
    boxes = torch.rand(2, 2, 100, 4, generator=generator)
    boxes[..., 2:] = SIDES.repeat(20)[:, None]
    boxes.requires_grad_()
    supervision = build_supervision(small("tiny").override(f"loss.classification={rule}"))
    task = supervision.task(
        "main", DecoderOutput(logits, boxes, boxes), crowd(classes), torch.tensor(250.0)
    )
    losses, _ = supervise([task])
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.isfinite()
    for tensor in (logits, boxes):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributions(dtype: torch.dtype) -> None:
    """FGL and DDF, of saturated logits, and of sides that lie where a box of no size has them."""
    generator = torch.Generator().manual_seed(0)
    sides = saturated(torch.randn(2, 2, 100, 4, 33, generator=generator)).to(dtype).requires_grad_()
    logits = torch.randn(2, 2, 100, 5, generator=generator).to(dtype)
    base = torch.rand(2, 100, 4, generator=generator)
    base[..., 2:] = SIDES.repeat(20)[:, None]
    bins = Bins()
    of_sides = SideDistributions(
        sides, base.expand(2, -1, -1, -1), weighting(bins, base), bins.scale
    )
    boxes = mean_boxes(of_sides)
    recipe = small("dfine_s").override("loss.union=false")
    task = build_supervision(recipe).task(
        "main",
        DecoderOutput(logits, boxes, boxes, sides=of_sides),
        crowd(5),
        torch.tensor(250.0),
    )
    losses, _ = supervise([task])
    assert {"main/fgl/0", "main/fgl/1", "main/ddf/0"} <= set(losses)
    assert_finite(losses)
    torch.stack(list(losses.values())).sum().backward()
    assert sides.grad is not None
    assert sides.grad.isfinite().all()
    assert sides.grad.any()


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["dfine_s", "mask2former_r50", "mask_dino_r50"])
def test_networks_of_distributions_and_masks(name: str, amp: bool) -> None:
    assert_finite(losses_of(small(name), 5, amp=amp))


def losses_of(recipe: Recipe, classes: int, *, amp: bool) -> dict[str, Tensor]:
    """The losses of a step whose logits are all saturated,
    those of proposals too, after its backward pass.
    """
    model = build(recipe, classes).train()
    saturate(model)
    batch, truth = images(), crowd(classes)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = model(
            batch, truth if model.sampling is None else with_bitmaps(truth, batch)
        ).losses
    torch.stack(list(losses.values())).sum().backward()
    wrong = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    assert not wrong, wrong
    return losses


def saturate(model: TrainableDetector) -> None:
    """Let the decoder and the proposals of this model give saturated logits: of the classes, and
    where it has any of distributions and of masks."""
    for heads in [part for part in model.modules() if isinstance(part, Heads)]:
        for head in [
            *(heads.boxes if heads.bins else ()),
            *((heads.embed,) if heads.embed else ()),
        ]:
            head.register_forward_hook(lambda _, __, out: saturated(out))
    detector = model.detector
    decode, propose = detector.decode, detector.propose

    def decoded(*args: object) -> dict[str, DecoderOutput]:
        outputs = decode(*args)  # type: ignore[arg-type]
        return {
            name: output._replace(logits=saturated(output.logits))
            for name, output in outputs.items()
        }

    def proposed(*args: object) -> object:
        queries, proposals = propose(*args)  # type: ignore[arg-type]
        if proposals is None:
            return queries, None
        embeds = proposals.mask_embeds
        return queries, proposals._replace(
            logits=saturated(proposals.logits),
            mask_embeds=None if embeds is None else saturated(embeds),
        )

    detector.decode, detector.propose = decoded, proposed  # type: ignore[method-assign, assignment]


def assert_finite(losses: dict[str, Tensor]) -> None:
    wrong = [name for name, value in losses.items() if not value.isfinite()]
    assert not wrong, wrong
