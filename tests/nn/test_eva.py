"""EVA-02's ViT as a backbone:
sizes, windows, checkpointing, and the names of pretrained weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from torch import Tensor

from detrellis.engine.optim import layer_factors
from detrellis.errors import UserError
from detrellis.nn.eva import EvaViT
from detrellis.recipes import find_recipe
from detrellis.recipes.backbones import EvaViTConfig
from detrellis.recipes.build import build
from detrellis.recipes.build_backbone import build_backbone

from ..small import CLASSES, images, small, targets

SIZES: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "window": 3,
    "global_blocks": (1,),
    "grid": 4,
}


def vit(**changes: Any) -> EvaViT:
    torch.manual_seed(0)
    return EvaViT(**SIZES | changes)


@pytest.mark.parametrize("size", [(64, 64), (61, 90), (1, 17)])
def test_images_of_any_size_are_padded_to_whole_patches(size: tuple[int, int]) -> None:
    network = vit().eval()
    pixels = torch.randn(1, 3, *size)
    (map_,) = network(pixels)
    height, width = (-(-side // 16) for side in size)
    assert map_.shape == (1, 32, height, width)
    padded = torch.zeros(1, 3, 16 * height, 16 * width)
    padded[..., : size[0], : size[1]] = pixels
    assert torch.equal(map_, network(padded)[0])


def test_a_window_that_is_the_map_is_no_window() -> None:
    windows, whole = vit(window=4, global_blocks=()), vit(global_blocks=(0, 1))
    assert torch.equal(windows(torch.ones(1, 3, 64, 64))[0], whole(torch.ones(1, 3, 64, 64))[0])


def test_checkpointing_changes_no_bit_of_losses_and_gradients() -> None:
    """Dropped branches and units are drawn again alike."""
    found = []
    for checkpointing in ("false", "true"):
        again = f"detector.backbone.checkpointing={checkpointing}"
        random = ["detector.backbone.drop_path=0.5", "detector.dropout=0.1"]
        model = build(small("co_dino_vit_l", ["none"]).override([again, *random]), CLASSES).train()
        torch.manual_seed(3)
        loss = torch.stack(list(model(images(), targets((2, 3))).losses.values())).sum()
        loss.backward()
        gradients = [p.grad for p in model.detector.parameters()]
        found.append([loss, *(g for g in gradients if g is not None)])
        assert len(found[-1]) == len(found[0]) > 100
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def theirs(**changes: Any) -> Eva:
    """timm's, without its class token: two blocks that read the whole map."""
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "patch_size": 16,
        "img_size": 64,
        "class_token": False,
        "global_pool": "avg",
    }
    mlp = {
        "mlp_ratio": 8 / 3,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "qkv_fused": False,
        "use_fc_norm": False,
    }
    positions = {"use_rot_pos_emb": True, "ref_feat_shape": (16, 16), "dynamic_img_size": True}
    network: Eva = Eva(
        num_classes=0, embed_dim=32, depth=2, num_heads=2, **options | mlp | positions | changes
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def config(file: Path, **changes: Any) -> EvaViTConfig:
    return EvaViTConfig(**SIZES | {"global_blocks": (0, 1), "weights": str(file)} | changes)


def test_weights_of_timm_give_what_timm_computes(tmp_path: Path) -> None:
    # Timm resizes positions with another bicubic filter
    other, pixels = theirs(), torch.randn(2, 3, 64, 64)
    torch.save(other.state_dict(), tmp_path / "w.pth")
    network = build_backbone(config(tmp_path / "w.pth")).eval()
    assert isinstance(network, EvaViT)
    assert torch.equal(network.out_norm.bias, other.norm.bias)
    # Before the last norm, whose epsilon is another one in detectors.
    (expected,) = other.forward_intermediates(
        pixels, indices=1, norm=False, intermediates_only=True
    )
    found = network.encoded(network.embedded(pixels)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.net.", ""])
def test_released_names_of_detectors_on_eva02(prefix: str, tmp_path: Path) -> None:
    """With patches and positions of other sizes, rotary tables, and no norm at the end."""
    network = vit()
    state: dict[str, Tensor] = {
        k: v for k, v in network.state_dict().items() if not k.startswith("out_norm")
    }
    state["patch_embed.proj.weight"] = torch.randn(32, 3, 14, 14)
    state["pos_embed"] = torch.randn(1, 1 + 6 * 6, 32)
    state |= {
        "rope_win.freqs_cos": torch.ones(9, 16),
        "blocks.0.attn.rope.freqs_sin": torch.ones(9, 16),
    }
    torch.save(
        {"model": {prefix + name: value for name, value in state.items()}}, tmp_path / "w.pth"
    )
    loaded = build_backbone(config(tmp_path / "w.pth", global_blocks=(1,))).state_dict()
    assert loaded["patch_embed.proj.weight"].shape == (32, 3, 16, 16)
    assert torch.equal(loaded["pos_embed"][:, 0], state["pos_embed"][:, 0])
    same = [name for name in state if name.startswith("blocks") and "rope" not in name]
    assert same
    assert all(torch.equal(loaded[name], state[name]) for name in same)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(theirs().state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"do not fit this ViT: blocks\.2\.norm1\.weight is missing"
    ):
        build_backbone(config(tmp_path / "w.pth", depth=3))
    positions = {"pos_embed": torch.zeros(1, 2 + 4 * 4, 32)}  # with two tokens beside them
    torch.save(theirs().state_dict() | positions, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"pos_embed is \(1, 18, 32\) there and \(1, 17, 32\) here"):
        build_backbone(config(tmp_path / "w.pth"))


def test_frozen_blocks_and_embedding() -> None:
    network = vit(frozen=1)
    trained = {name.partition(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"blocks", "out_norm"}
    assert not any(p.requires_grad for p in network.blocks[0].parameters())
    network.hold(False)
    assert all(p.requires_grad for p in network.parameters())


def test_rates_fall_from_the_last_block_to_the_pixels() -> None:
    names = [
        name for name, _ in build(small("co_dino_vit_l", ["none"]), CLASSES).named_parameters()
    ]
    found = layer_factors(names, 0.5)
    factors = {
        name.partition("backbone.")[2]: value
        for name, value in found.items()
        if "backbone." in name
    }
    assert factors["pos_embed"] == factors["patch_embed.proj.weight"] == 0.125
    assert (
        factors["blocks.0.attn.q_bias"],
        factors["blocks.1.mlp.w3.bias"],
        factors["out_norm.bias"],
    ) == (
        0.25,
        0.5,
        1,
    )
    assert {value for name, value in found.items() if "backbone." not in name} == {1.0}


def test_the_large_one_has_as_many_parameters_as_published() -> None:
    with torch.device("meta"):
        network = build_backbone(find_recipe("co-dino-vit-l").detector.backbone.untrained())
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(304e6, rel=1e-3)
