"""RT-DETR's hybrid encoder: positions by hand, maps of any size, and convolutions that fuse."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from detrellis.errors import UserError
from detrellis.nn.fusion import ConvNorm, RepConvolution, fuse
from detrellis.nn.hybrid import GridSine, HybridNeck, csp_parts
from detrellis.recipes.build import build
from detrellis.types import ImageBatch

from ..small import CLASSES, images, small


def test_positions_are_sines_of_the_row_and_then_of_the_column() -> None:
    found = GridSine(8, temperature=100.0)(torch.ones(1, 2, 3, dtype=torch.float64))
    assert found.shape == (1, 6, 8)
    for row in range(2):
        for column in range(3):
            expected = []
            for place in (row, column):
                angles = [place * 1.0, place * 0.1]  # 100^(-k/2)
                expected += [*map(math.sin, angles), *map(math.cos, angles)]
            torch.testing.assert_close(
                found[0, row * 3 + column], torch.tensor(expected, dtype=torch.float64)
            )


def test_maps_of_any_size_keep_it() -> None:
    neck = HybridNeck((4, 6, 8), 16, 12, [], csp_parts(2, 0.5)).eval()
    maps = [torch.randn(1, c, h, w) for c, h, w in ((4, 9, 13), (6, 5, 7), (8, 3, 4))]
    memory = neck(maps, None)
    assert memory.shapes == ((9, 13), (5, 7), (3, 4))
    assert memory.tokens.shape == (1, 9 * 13 + 5 * 7 + 3 * 4, 16)
    assert not memory.position.any()


def randomised(module: nn.Module) -> nn.Module:
    """With statistics that BatchNorm would have after training."""
    for part in module.modules():
        if "BatchNorm" in type(part).__name__:
            for name, tensor in {
                **dict(part.named_parameters()),
                **dict(part.named_buffers()),
            }.items():
                if name in ("weight", "running_var"):
                    tensor.data.uniform_(0.5, 2)
                elif name in ("bias", "running_mean"):
                    tensor.data.normal_()
    return module.double().eval()


def test_blocks_fuse_to_one_convolution() -> None:
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    for block in (
        ConvNorm(6, 4, 3, 2, activation="silu"),
        ConvNorm(6, 6, 3, groups=6),
        RepConvolution(6),
    ):
        randomised(block)
        with torch.no_grad():
            before = block(x)
            fuse(block, partial(block, x))
            fuse(block, partial(block, x))  # the second time changes nothing
            torch.testing.assert_close(block(x), before, rtol=0, atol=1e-10)
        assert sum(isinstance(part, nn.Conv2d) for part in block.modules()) == 1
        assert not any(isinstance(part, nn.BatchNorm2d) for part in block.modules())


class Shared(nn.Module):
    """What cannot be fused: a convolution that others read too, and one that runs for two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        x = self.norms[0](first) + first
        return self.norms[1](self.second(x)) + self.norms[2](self.second(-x))


@torch.no_grad()
def test_what_others_read_too_stays_as_it_is() -> None:
    module, x = randomised(Shared()), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    before = module(x)
    fuse(module, partial(module, x))
    assert torch.equal(module(x), before)
    assert sum(isinstance(part, nn.BatchNorm2d) for part in module.modules()) == 3


FUSED = ["rtdetr_r18", "lwdetr_tiny"]  # on timm's ResNet, and on a ViT


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_a_detector_fuses_for_inference(name: str) -> None:
    detector = build(small(name), CLASSES).detector
    randomised(detector)
    batch = ImageBatch(images().pixels.double())
    whole = detector(batch)
    fused = detector.fused()
    for ours, expected in zip(fused(batch)[:3], whole[:3], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert not [name for name, part in fused.named_modules() if "BatchNorm" in type(part).__name__]
    assert not any(p.requires_grad for p in fused.parameters())
    assert len(fused.state_dict()) < len(detector.state_dict())
    assert any("BatchNorm" in type(part).__name__ for part in detector.modules())
    with pytest.raises(UserError, match="a fused detector cannot be trained"):
        fused.train()
    assert detector.train().training
    assert not fused.eval().training


def test_frozen_norms_fuse_as_well() -> None:
    """Ours, and torchvision's and timm's in a timm model, the latter with the activation in it."""
    for name, backbone in (("rtdetr_r18", "resnet18vd"), ("dfine_s", "hgnetv2_b0")):
        recipe = small(name).override(
            [f"detector.backbone.name={backbone}", "detector.backbone.norm=frozen"]
        )
        with torch.device("meta"):
            detector = build(recipe, CLASSES).detector
            assert any("Frozen" in type(part).__name__ for part in detector.modules())
            fused = detector.fused()
        kinds = {type(part).__name__ for part in fused.modules()}
        assert not [kind for kind in kinds if "BatchNorm" in kind or "Frozen" in kind]
        batch = ImageBatch(torch.empty(1, 3, 64, 64, device="meta"))
        assert fused(batch).boxes.shape == detector.eval()(batch).boxes.shape
