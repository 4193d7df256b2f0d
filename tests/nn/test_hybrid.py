"""RT-DETR's hybrid encoder: positions by hand, maps of any size, and convolutions that fuse."""

from __future__ import annotations

import math

import torch
from torch import nn

from detrellis.nn.fusion import ConvNorm, RepConvolution
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
            torch.testing.assert_close(found[0, row * 3 + column], torch.tensor(expected, dtype=torch.float64))


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
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight.data, part.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 2)
            for tensor in (part.bias.data, part.running_mean):
                assert tensor is not None
                tensor.normal_()
    return module.double().eval()


def test_blocks_fuse_to_one_convolution() -> None:
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    for block in (ConvNorm(6, 4, 3, 2, activation="silu"), ConvNorm(6, 6, 3, groups=6), RepConvolution(6)):
        randomised(block)
        with torch.no_grad():
            before = block(x)
            block.fuse()
            block.fuse()  # the second time changes nothing
            torch.testing.assert_close(block(x), before, rtol=0, atol=1e-10)
        assert sum(isinstance(part, nn.Conv2d) for part in block.modules()) == 1
        assert not any(isinstance(part, nn.BatchNorm2d) for part in block.modules())


@torch.no_grad()
def test_a_detector_fuses_for_inference() -> None:
    detector = build(small("rtdetr_r18"), CLASSES).detector
    randomised(detector)
    batch = ImageBatch(images().pixels.double())
    whole = detector(batch)
    fused = detector.fused()
    for ours, expected in zip(fused(batch)[:3], whole[:3], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.neck.modules())
    assert not any(p.requires_grad for p in fused.parameters())
    assert len(fused.state_dict()) < len(detector.state_dict())
    assert any(isinstance(part, RepConvolution) and part.point is not None for part in detector.neck.modules())
