"""Backbones: strides, frozen parts, the switch for training from scratch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detrellis.errors import UserError
from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.build_backbone import build_backbone


def config(name: str = "resnet18", **options: object) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": name, "pretrained": False, **options})


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv3_small_050"]
)
@pytest.mark.parametrize("strides", [(8, 16, 32), (4, 8, 16, 32), (8, 16)])
def test_maps_have_the_asked_strides(name: str, strides: tuple[int, ...]) -> None:
    backbone = build_backbone(config(name, strides=strides)).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    assert [m.shape[-2:] for m in maps] == [(64 // s, 96 // s) for s in strides]
    assert [m.shape[1] for m in maps] == backbone.channels


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "convnext_atto"]
)
@pytest.mark.parametrize("size", [(64, 96), (62, 93)])
def test_timm_models_take_any_image_size(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        backbone = build_backbone(config(name)).eval()
        maps = backbone(torch.empty(1, 3, *size))
    assert [m.shape[1:] for m in maps] == [
        (c, -(-64 // s), -(-96 // s)) for c, s in zip(backbone.channels, (8, 16, 32), strict=True)
    ]


def test_dilation_keeps_the_last_stride() -> None:
    backbone = build_backbone(config("resnet50", strides=(32,), dilation=True)).eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 64, 96))[0].shape == (1, 2048, 4, 6)
    with pytest.raises(UserError, match="resnet18"):
        build_backbone(config(dilation=True))
    with pytest.raises(UserError, match="resnet50"):
        build_backbone(config("mobilenetv3_small_050", dilation=True))


def test_frozen_as_in_the_papers() -> None:
    backbone = build_backbone(config("resnet50", norm="frozen", strides=(4, 8, 16, 32)))
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained
    assert not any(n.startswith(("stem", "stages.layer1")) for n in trained)
    assert not any("bn" in n for n, _ in backbone.named_parameters())
    backbone.train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_from_scratch_everything_trains() -> None:
    backbone = build_backbone(config("resnet18"))
    assert all(p.requires_grad for p in backbone.parameters())
    assert any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


def test_frozen_norm_is_the_spec_formula() -> None:
    backbone = build_backbone(config("resnet18", norm="frozen"))
    norm = backbone.stem[1]  # type: ignore[index]
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    x = torch.randn(1, 64, 4, 4)
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    expected = x * scale.view(1, -1, 1, 1) + (norm.bias - norm.running_mean * scale).view(
        1, -1, 1, 1
    )
    torch.testing.assert_close(norm(x), expected)


def test_unknown_names_are_user_errors() -> None:
    with pytest.raises(UserError, match="no_such_model"):
        build_backbone(config("no_such_model"))
    with pytest.raises(UserError, match="stride"):
        build_backbone(config("mobilenetv3_small_050", strides=(7,)))
    with pytest.raises(UserError, match="stride"):
        build_backbone(config("resnet18", strides=(7,)))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_branches_are_dropped_at_the_rate_asked_for(rate: float) -> None:
    name = "swin_tiny_patch4_window7_224"
    model = build_backbone(BackboneConfig(name=name, pretrained=False, drop_path=rate))
    rates = [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    assert max(rates, default=0.0) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("name", "frozen", "still"),
    [
        ("resnet18", "all", ("stem", "stages")),
        ("resnet18", 2, ("stem", "stages.layer1.", "stages.layer2.")),
        ("test_resnet", "all", ("model",)),
        ("test_resnet", 1, ("model.conv1", "model.bn1", "model.layer1.")),
        ("swin_tiny_patch4_window7_224", 1, ("model.patch_embed", "model.layers_0.")),
        ("hrnet_w18_small", "all", ("model",)),
        (
            "mobilenetv3_small_050",
            2,
            ("model.conv_stem", "model.bn1", "model.blocks.0.", "model.blocks.1."),
        ),
    ],
)
def test_what_is_frozen_stays(name: str, frozen: int | str, still: tuple[str, ...]) -> None:
    """No gradients and no statistics, also after `train`;
    and the network that infers is the same.
    """
    torch.manual_seed(0)
    backbone = build_backbone(config(name, frozen=frozen))
    torch.manual_seed(0)
    free = build_backbone(config(name))
    assert all(
        torch.equal(a, b)
        for a, b in zip(free.state_dict().values(), backbone.state_dict().values(), strict=True)
    )
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert all(
            torch.equal(a, b)
            for a, b in zip(free.eval()(pixels), backbone.eval()(pixels), strict=True)
        )
    backbone.train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    out = torch.stack([m.sum() for m in backbone(pixels)]).sum()
    if out.requires_grad:
        out.backward()
    assert out.requires_grad == (frozen != "all")
    moved = {
        key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])
    }
    assert not any(key.startswith(still) for key in moved)
    learnt = {key for key, value in backbone.named_parameters() if value.grad is not None}
    assert learnt == {key for key, _ in backbone.named_parameters() if not key.startswith(still)}
    if frozen != "all" and name != "swin_tiny_patch4_window7_224":
        assert any("running_mean" in key for key in moved)  # what is not frozen moves as ever


def test_stages_that_do_not_exist_cannot_be_frozen() -> None:
    with pytest.raises(UserError, match=r"frozen=5: backbone resnet18 has 4 stages"):
        build_backbone(config(frozen=5))
    with pytest.raises(UserError, match="the stages of backbone hrnet_w18_small"):
        build_backbone(config("hrnet_w18_small", frozen=1))


@pytest.mark.parametrize(("name", "norm"), [("resnet18", "frozen"), ("test_resnet", "batch")])
def test_what_was_frozen_can_be_let_go(name: str, norm: str) -> None:
    """All of it trains then as if it had never been frozen: not what `norm` freezes."""
    backbone = build_backbone(config(name, frozen=2, norm=norm))
    free = build_backbone(config(name, norm=norm))
    modes = {key: module.training for key, module in free.train().named_modules()}
    assert not all(p.requires_grad for p in backbone.parameters())
    backbone.train()
    backbone.hold(False)
    assert {key: module.training for key, module in backbone.named_modules()} == modes
    for (key, ours), theirs in zip(backbone.named_parameters(), free.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad, key
    backbone.hold(True)
    assert not next(backbone.parameters()).requires_grad


@torch.no_grad()
def test_a_swin_pads_before_it_shifts() -> None:
    """A map that is no multiple of the windows is as one that was padded with nothing beside it."""
    model = build_backbone(
        BackboneConfig(name="swin_tiny_patch4_window7_224", pretrained=False)
    ).eval()
    block = model.get_submodule("model.layers_0.blocks.1")
    assert block.shift_size == (3, 3)
    assert model.get_submodule("model.layers_3.blocks.1").shift_size == (3, 3)
    x = torch.randn(1, 9, 12, 96)
    padded = block._attn(torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 5)))  # type: ignore[operator]
    torch.testing.assert_close(block._attn(x), padded[:, :9, :12])  # type: ignore[operator]
