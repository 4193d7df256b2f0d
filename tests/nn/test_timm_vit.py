"""timm's plain ViTs as backbones with maps of several strides."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from detrellis.errors import UserError
from detrellis.nn.pyramid import PyramidNeck
from detrellis.recipes import find_recipe
from detrellis.recipes.backbones import BackboneConfig, TimmViTConfig
from detrellis.recipes.build import build
from detrellis.recipes.build_backbone import build_backbone, starting_from

from ..small import CLASSES, images, small, targets

SWITCH = [
    "detector.backbone.kind=timm_vit",
    "detector.backbone.name=test_vit",
    "detector.backbone.pretrained=false",
]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", (64, 96)),
        ("test_vit", (50, 81)),
        ("vit_small_patch14_reg4_dinov2", (50, 81)),
        ("vit_small_patch16_dinov3", (50, 81)),
    ],
)
def test_one_map_of_stride_16_whatever_the_patch(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        backbone = build_backbone(TimmViTConfig(name=name, pretrained=False)).eval()
        (map_,) = backbone(torch.empty(1, 3, *size))
    assert map_.shape == (1, backbone.channels[0], 4, 6)


@pytest.mark.parametrize(("name", "levels"), [("dino_r50", 4), ("detr_r50", 1), ("rtdetr_r18", 3)])
def test_a_detector_on_it_trains(name: str, levels: int) -> None:
    recipe = small(name, ["none"]).override(SWITCH)
    model = build(recipe, CLASSES).train()
    assert isinstance(model.detector.neck, PyramidNeck)
    memory = model.detector.encode(images())
    assert memory.shapes[0] == ((2, 3) if levels == 1 else (8, 12))
    assert len(memory.shapes) == levels
    torch.stack(list(model(images(), targets((2, 3))).losses.values())).sum().backward()
    last = model.detector.backbone.model.blocks[-1].attn.proj.weight.grad
    assert last is not None
    assert last.any()


def test_a_file_in_the_authors_sizes(tmp_path: Path) -> None:
    """A kernel of 8 pixels for patches, and its positions as they are."""
    theirs = timm.create_model("test_vit", patch_size=8, img_size=128)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    backbone = build_backbone(
        TimmViTConfig(name="test_vit", weights=str(tmp_path / "w.pth"), drop_path=0.1)
    )
    block = "blocks.0.attn.qkv.weight"
    assert torch.equal(backbone.state_dict()[f"model.{block}"], theirs.state_dict()[block])
    torch.save({k: v for k, v in theirs.state_dict().items() if k != block}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"do not fit backbone test_vit: {block}"):
        build_backbone(TimmViTConfig(name="test_vit", weights=str(tmp_path / "w.pth")))
    (tmp_path / "w.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        build_backbone(TimmViTConfig(name="test_vit", weights=str(tmp_path / "w.pth")))


def test_frozen_blocks_with_all_that_comes_before_them() -> None:
    backbone = build_backbone(TimmViTConfig(name="test_vit", pretrained=False, frozen=2))
    held = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert {"model.cls_token", "model.pos_embed", "model.patch_embed.proj.weight"} < held
    assert {name.split(".")[2] for name in held if "blocks" in name} == {"0", "1"}


def test_what_is_no_plain_vit_is_named() -> None:
    with pytest.raises(UserError, match="it is no plain ViT"):
        build_backbone(TimmViTConfig(name="test_resnet", pretrained=False))
    with pytest.raises(UserError, match="kind=timm_vit") as error:
        build_backbone(BackboneConfig(name="test_vit", pretrained=False))
    assert "maps of one stride, 16" in error.value.message


def test_pictures_are_normalised_as_its_weights_were_trained() -> None:
    recipe = find_recipe("tiny").override(
        [*SWITCH[:1], "detector.backbone.name=eva02_tiny_patch14_224"]
    )
    assert starting_from(recipe)[0].data.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
