"""ResNet-vd against timm's ResNet-D,
which has the same tensors but for the first shortcut of the smaller two.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from detrellis.nn.pretrained import IMAGENET, Source
from detrellis.nn.resnet_vd import ResNetVD, timm_name


def drawn(name: str) -> nn.Module:
    """timm's model with statistics as after training."""
    model: nn.Module = timm.create_model(timm_name(name), num_classes=3)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight.data, part.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18vd", "resnet50vd"])
@torch.no_grad()
def test_it_computes_what_timm_computes_with_the_same_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = drawn(name)
    save_file(dict(model.state_dict()), tmp_path / "weights.safetensors")
    source = Source("a file", *IMAGENET, tmp_path / "weights.safetensors")
    ours = ResNetVD(name, (8, 16, 32), pretrained=source, norm="frozen").eval()
    pixels = torch.randn(1, 3, 64, 96)
    expected = model.forward_intermediates(pixels, intermediates_only=True)[-3:]
    for found, theirs in zip(ours(pixels), expected, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-4)


def test_what_is_frozen() -> None:
    trained = {
        norm: ResNetVD("resnet18vd", (8, 16), pretrained=None, norm=norm)
        for norm in ("frozen", "batch")
    }
    assert all(p.requires_grad for p in trained["batch"].parameters())
    frozen = trained["frozen"]
    names = {name for name, p in frozen.named_parameters() if not p.requires_grad}
    assert names == {f"stem.0.{k}.weight" for k in (0, 3, 6)}
    assert not any(isinstance(part, nn.BatchNorm2d) for part in frozen.modules())
    assert "layer4" not in frozen.stages  # nobody wants its map
