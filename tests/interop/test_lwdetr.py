"""Random LW-DETR and RF-DETR models of transformers,
and files as their authors write them, to ours and back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detrellis.interop.convert import save_huggingface
from detrellis.interop.load import load_foreign
from detrellis.loading import load
from detrellis.recipes.network import build_detector
from detrellis.types import ImageBatch

from .test_rtdetr import check_detections, picture, their_detections

transformers = pytest.importorskip("transformers")

COMMON = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 40,
    "decoder_n_points": 2,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 8,
    "num_queries": 7,
    "group_detr": 3,
    "num_labels": 4,
    "dropout": 0.0,
}
CAE = {
    "model_type": "lw_detr_vit",
    "image_size": 128,
    "pretrain_image_size": 64,
    "num_attention_heads": 3,
}
LW = {
    **CAE,
    "hidden_size": 24,
    "num_hidden_layers": 5,
    "window_block_indices": [0, 2, 4],
    "out_indices": [2, 3, 5],
}
RF = {
    "model_type": "rf_detr_dinov2",
    "hidden_size": 24,
    "num_attention_heads": 3,
    "patch_size": 16,
    "num_windows": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # and the width of a picture
    "lwdetr": ("LwDetr", {"backbone_config": LW, "projector_scale_factors": [1.0]}, 192),
    "lwdetr on two levels": (
        "LwDetr",
        {"backbone_config": LW, "projector_scale_factors": [2.0, 0.5]},
        192,
    ),
    "wide lwdetr": (
        "LwDetr",
        {"backbone_config": LW | {"hidden_size": 528, "num_hidden_layers": 2, "out_indices": [2]}}
        | {"projector_scale_factors": [2.0, 0.5]},
        128,
    ),
    "rfdetr": (
        "RfDetr",
        {
            "backbone_config": RF
            | {"num_hidden_layers": 4, "image_size": 128, "out_features": ["stage2", "stage4"]}
        },
        128,
    ),
    "rfdetr with a block too many, resized": (
        "RfDetr",
        {
            "backbone_config": RF
            | {"num_hidden_layers": 4, "image_size": 64, "out_features": ["stage1", "stage3"]}
        },
        128,
    ),
}


def make(kind: str) -> Any:
    """A model with every parameter random, and running statistics too."""
    name, options, _ = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON | options)
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn(tensor.shape))
    return model.eval()


def batch(width: int) -> tuple[Tensor, Tensor]:
    """Two images, the second padded."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.zeros(2, 3, 128, width)
    padding = torch.ones(2, 128, width, dtype=torch.bool)
    for i, (h, w) in enumerate(((128, width), (96, width - 64))):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        padding[i, :h, :w] = False
    return pixels, padding


@torch.no_grad()
def their_outputs(model: Any, width: int) -> tuple[Tensor, Tensor]:
    pixels, padding = batch(width)
    out = model(pixels, pixel_mask=(~padding).long())
    return out.logits, out.pred_boxes


@torch.no_grad()
def our_outputs(place: Path, width: int) -> tuple[Tensor, Tensor]:
    found = load_foreign(place)
    detector = build_detector(found.recipe.detector, len(found.classes)).eval()
    detector.load_state_dict(dict(found.weights))
    out = detector(ImageBatch(*batch(width)))
    return out.logits[0], out.boxes[0]


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    theirs, width = make(kind), MODELS[kind][2]
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_outputs(theirs, width)
    for actual, wanted in zip(our_outputs(tmp_path / "theirs", width), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)
    found = load_foreign(tmp_path / "theirs")
    assert found.recipe.schemes.group is not None
    assert found.recipe.schemes.group.k == COMMON["group_detr"]
    save_huggingface(tmp_path / "back", found.weights, found.recipe, found.classes)
    back, report = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for actual, wanted in zip(their_outputs(back.eval(), width), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)
    assert back.config.id2label == theirs.config.id2label


@pytest.mark.parametrize("kind", ["lwdetr", "rfdetr"])
def test_a_jpeg_through_their_own_processor(kind: str, tmp_path: Path) -> None:
    theirs, path = make(kind), picture(tmp_path / "picture.jpg")
    make_processor = (
        transformers.RfDetrImageProcessor
        if kind == "rfdetr"
        else transformers.DeformableDetrImageProcessor
    )
    theirs.save_pretrained(tmp_path)
    make_processor(size={"height": 128, "width": 128}).save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, make_processor)
    scores, labels, boxes = their_detections(theirs, processor, path, top_k=COMMON["num_queries"])
    (found,) = load(tmp_path, device="cpu").predict([path], threshold=0.0)
    check_detections(found, scores, labels, boxes)
