"""bf16 autocast: the step runs, what must stay float32 does,
and the losses stay near those of float32.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from detrellis.nn.accelerate import accelerate
from detrellis.nn.attention import _attend
from detrellis.nn.backbone import ResNet
from detrellis.precision import autocast, has_bfloat16
from detrellis.recipes.build import build

from .contract.models import every_recipe, recipe_of
from .small import CLASSES, images, small, targets, with_bitmaps


@every_recipe
def test_a_step_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    recipe = recipe_of(name, "own").override(
        ["detector.dropout=0.0", "detector.backbone.drop_path=0.0"]
    )
    model = build(recipe, CLASSES)
    model.train()
    batch = images(((64, 96), (64, 80)))
    truth = with_bitmaps(targets((2, 3)), batch)
    totals = []
    for enabled in (False, True):
        model.reseed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(batch, truth)
        assert all(v.dtype == torch.float32 for v in out.losses.values())
        totals.append(torch.stack(list(out.losses.values())).sum())
    totals[1].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # A rounding may rank or match differently; of MS-DETR's pairs there are more or fewer then.
    near = 0.1 if recipe.schemes.ms is None else 0.25
    torch.testing.assert_close(totals[1], totals[0], rtol=near, atol=0)


@torch.no_grad()
def test_boxes_stay_float32() -> None:
    model = build(small("tiny"), CLASSES).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.detector(images()).boxes.dtype == torch.float32


def test_a_frozen_backbone_keeps_bf16_for_the_backward_pass() -> None:
    """Its maps in float32 beside those in bf16 would take more memory than without autocast."""
    torch.manual_seed(0)
    backbone = ResNet("resnet18", (8, 16, 32), pretrained=None, norm="frozen").train()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        maps = backbone(torch.rand(1, 3, 64, 64))
    assert {m.dtype for m in maps} == {torch.bfloat16}
    assert {t.dtype for t in kept if t.dim() == 4 and t.shape[0] == 1 and t.shape[2] > 1} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(
    ("answer", "has"), [(lambda: True, True), (lambda: False, False), (None, False)]
)
def test_cpus_have_bf16_with_amx(
    monkeypatch: pytest.MonkeyPatch, answer: object, has: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", answer, raising=False)
    assert has_bfloat16(torch.device("cpu")) == has
    assert not has_bfloat16(torch.device("mps"))
    for wanted in (False, True):
        with autocast(torch.device("cpu"), wanted):
            assert torch.is_autocast_enabled("cpu") == (has and wanted)


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
def test_depthwise_convolutions_are_trained_in_float32_on_cpus(kind: type[nn.Conv2d]) -> None:
    """Their gradients in bf16 take ten times as long there."""
    depthwise, plain = kind(8, 8, 3, groups=8), kind(8, 8, 3)
    names = list(depthwise.state_dict())
    accelerate(depthwise, plain)
    accelerate(depthwise, plain)
    depthwise = pickle.loads(pickle.dumps(copy.deepcopy(depthwise)))
    assert isinstance(depthwise, kind)
    assert list(depthwise.state_dict()) == names
    x = torch.randn(1, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x).dtype == torch.bfloat16
        out: Tensor = depthwise(x.bfloat16())
        with torch.no_grad():
            assert depthwise(x).dtype == torch.bfloat16
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, depthwise(x.bfloat16().float()))


def _leave_nan_behind() -> None:
    """Frees memory of all sizes full of NaN, for whoever reads what nobody wrote."""
    sizes = [2**n for n in range(4, 19)]
    blocks = [torch.full((size,), float("nan")) for size in sizes for _ in range(8)]
    del blocks


@pytest.mark.parametrize(
    ("kernel", "stride", "width"), [(3, 2, 1), (3, 2, 2), (7, 2, 2), (4, 4, 7), (3, 3, 3)]
)
@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
def test_strided_convolutions_to_one_column_are_right(
    kind: type[nn.Conv2d], kernel: int, stride: int, width: int
) -> None:
    """In bf16 oneDNN reads beyond them, forwards and in the weights' gradient."""
    layer = kind(64, 64, kernel, stride, padding=0 if kernel == stride else kernel // 2)
    accelerate(layer)
    for rows in (7, 16):
        x = torch.randn(2, 64, rows, width)
        for _ in range(4):
            layer.zero_grad()
            _leave_nan_behind()
            with torch.autocast("cpu", torch.bfloat16):
                out = layer(x)
                assert layer(x.new_zeros(2, 64, rows, 16)).dtype == torch.bfloat16
            _leave_nan_behind()
            out.sum().backward()
            assert out.isfinite().all()
            assert layer.weight.grad is not None
            assert layer.weight.grad.isfinite().all()
        torch.testing.assert_close(out, layer(x))


@pytest.mark.parametrize("mask", [None, torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4)])
def test_attention_is_trained_in_float32_on_cpus(mask: Tensor | None) -> None:
    rows = [torch.randn(1, 2, 4, 8, dtype=torch.bfloat16) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out = _attend(*rows, mask, 0.0)
        with torch.no_grad():
            assert _attend(*rows, mask, 0.0).dtype == torch.bfloat16
    torch.testing.assert_close(out, _attend(*(r.float() for r in rows), mask, 0.0))
