"""Tensors that are made once: what stays the same, and what must be made anew."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from detrellis.nn import constants
from detrellis.nn.constants import kept
from detrellis.nn.encoder import token_centres
from detrellis.nn.frozen import FrozenNorm, freeze_timm
from detrellis.nn.position import SineMap
from detrellis.types import Memory


@pytest.fixture
def made() -> tuple[list[int], Callable[[int], Tensor]]:
    """What a kept function was called with, and the function."""
    calls: list[int] = []

    @kept(2)
    def ones(count: int) -> Tensor:
        calls.append(count)
        return torch.ones(count)

    return calls, ones


def test_the_last_ones_are_kept(made: tuple[list[int], Callable[[int], Tensor]]) -> None:
    calls, ones = made
    assert ones(3) is ones(3)
    ones(4), ones(5), ones(3)
    assert calls == [3, 4, 5, 3]


def test_a_graph_gets_every_operation(
    made: tuple[list[int], Callable[[int], Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, ones = made
    ones(3)
    monkeypatch.setattr(constants, "traced", lambda: True)
    ones(3)
    assert calls == [3, 3]


def test_what_inference_made_serves_training(
    made: tuple[list[int], Callable[[int], Tensor]],
) -> None:
    calls, ones = made
    norm = FrozenNorm(2)
    with torch.inference_mode():
        ones(3), norm(torch.ones(1, 2, 1, 1))
    x = torch.ones(3, requires_grad=True)
    (x * ones(3)).sum().backward()
    assert calls == [3]
    maps = torch.ones(1, 2, 1, 1, requires_grad=True)
    norm(maps).sum().backward()
    assert maps.grad is not None


def write(norm: FrozenNorm) -> None:
    norm.running_var.mul_(2)


def load(norm: FrozenNorm) -> None:
    norm.load_state_dict({name: value + 1 for name, value in norm.state_dict().items()})


def replace(norm: FrozenNorm) -> None:
    norm.weight = norm.weight + 1


@pytest.mark.parametrize("change", [write, load, replace, FrozenNorm.double])
def test_a_frozen_norm_follows_its_buffers(change: Callable[[FrozenNorm], object]) -> None:
    """It has the bits of torchvision's,
    also after its buffers have changed, and in a copy whose own have.
    """
    norm, maps = FrozenNorm(8), torch.randn(2, 8, 3, 5)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    before = norm(maps)
    assert torch.equal(before, FrozenBatchNorm2d.forward(norm, maps))
    copied = copy.deepcopy(norm)
    change(copied)
    change(norm)
    assert not torch.equal(norm(maps), before)
    maps = maps.to(norm.weight.dtype)
    for changed in (norm, copied):
        assert torch.equal(changed(maps), FrozenBatchNorm2d.forward(changed, maps))


def test_scale_and_shift_are_computed_once() -> None:
    norm = FrozenNorm(8)
    assert norm.scale_and_shift(torch.float32)[0] is norm.scale_and_shift(torch.float32)[0]


def test_frozen_maps_keep_their_dtype() -> None:
    """Under autocast nothing is held in float32 beside bf16; scale and shift are rounded once."""
    norm, maps = FrozenNorm(8), torch.randn(2, 8, 3, 5)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    rough = norm(maps.bfloat16())
    assert rough.dtype is torch.bfloat16
    torch.testing.assert_close(rough.float(), norm(maps), rtol=0.02, atol=0.02)
    assert norm(maps).dtype is torch.float32


@pytest.mark.parametrize("name", ["resnet18d", "mobilenetv2_100"])
def test_timms_frozen_norms_are_ours(name: str) -> None:
    """With and without an activation of their own: the same bits and names, and bf16 stays."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False, features_only=True).eval()
    for part in theirs.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.bias, -0.1, 0.1)
            assert part.running_var is not None
            part.running_var.uniform_(0.5, 2)
    ours = freeze_timm(copy.deepcopy(theirs))
    theirs = freeze_batch_norm_2d(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    pixels = torch.rand(1, 3, 64, 64)
    for a, b in zip(ours(pixels), theirs(pixels), strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert {m.dtype for m in ours(pixels)} == {torch.bfloat16}


@pytest.mark.parametrize("blank", [False, True])
def test_positions_without_padding_are_those_of_a_valid_map(blank: bool) -> None:
    position = SineMap(16, temperature=20.0, offset=-0.5, blank=blank)
    found = position.unpadded((3, 5), torch.float32, torch.device("cpu"))
    assert torch.equal(found, position(torch.ones(1, 3, 5)))


def test_centres_are_relative_to_the_unpadded_image() -> None:
    shapes = ((2, 3), (1, 2))
    memory = Memory(torch.zeros(2, 8, 4), torch.zeros(1, 8, 4), shapes)
    whole = token_centres(memory)
    assert torch.equal(whole[0, :2], torch.tensor([[1 / 6, 0.25], [0.5, 0.25]]))
    assert torch.equal(whole[0, 6:], torch.tensor([[0.25, 0.5], [0.75, 0.5]]))
    ratios = torch.tensor([[[1.0, 0.5], [0.5, 1.0]], [[0.75, 1.0], [1.0, 1.0]]])  # (B, V, 2)
    padded = token_centres(memory._replace(valid_ratios=ratios))
    assert torch.equal(padded[:, :6], whole[:, :6] / ratios[:, :1])
    assert torch.equal(padded[:, 6:], whole[:, 6:] / ratios[:, 1:])
