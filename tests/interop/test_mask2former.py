"""Mask2Former's checkpoints:
of transformers in and out, and of its own code, whose pickles are not trusted.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detrellis.data.classes import ClassMap
from detrellis.detector import Detector
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import save_weights
from detrellis.errors import UserError
from detrellis.interop.convert import convert
from detrellis.interop.links import link_up, missing, to_theirs
from detrellis.interop.load import Converted, load_foreign
from detrellis.interop.mask2former import as_convolutions, detectron2, turned
from detrellis.recipes.network import build_detector
from detrellis.types import ImageBatch

from ..small import small

transformers = pytest.importorskip("transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SIZES: dict[str, Any] = {
    "feature_size": 64,
    "mask_feature_size": 32,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 64,
    "encoder_layers": 1,
    "decoder_layers": 4,
    "num_attention_heads": 4,
    "dim_feedforward": 64,
    "num_queries": 9,
    "num_labels": 5,
}
STAGES = [f"stage{i}" for i in range(1, 5)]
# Windows of 7 at stride 32: every stage has at least one whole window.
PIXELS = (256, 288)


def backbone(kind: str) -> Any:
    if kind == "swin":
        # Swin-T is its default
        return transformers.SwinConfig(out_features=STAGES, drop_path_rate=0.0)
    return transformers.ResNetConfig(
        layer_type="basic",
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        out_features=STAGES,
    )


def theirs(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Mask2FormerConfig(backbone_config=backbone(kind), **(SIZES | changes))
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def ours(found: Converted) -> Detector:
    detector = build_detector(found.recipe.detector, len(found.classes))
    detector.load_state_dict(dict(found.weights))
    return detector.eval()


def masks_of(detector: Detector, pixels: Tensor) -> tuple[Tensor, Tensor]:
    output = detector(ImageBatch(pixels))
    assert output.masks is not None
    assert output.mask_embeds is not None
    return output.logits[-1], torch.einsum(
        "bnd,bdhw->bnhw", output.mask_embeds[-1], output.masks.map
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("resnet", {}),
        ("resnet", {"hidden_dim": 32, "enforce_input_projection": True}),
        ("swin", {}),
    ],
)
@torch.no_grad()
def test_both_ways_give_the_same_masks(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = theirs(kind, **changes)
    model.save_pretrained(tmp_path / "theirs")
    found = load_foreign(tmp_path / "theirs")
    assert found.recipe.loss.points == 12544
    pixels = torch.randn(1, 3, *PIXELS)
    expected = model(pixels)
    logits, masks = masks_of(ours(found), pixels)
    torch.testing.assert_close(logits, expected.class_queries_logits, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(masks, expected.masks_queries_logits, atol=2e-3, rtol=1e-3)
    # And back: every tensor of theirs, with the same numbers.
    card = Card(found.recipe, found.classes, {})
    save_weights(tmp_path / "ours" / "best.safetensors", found.weights, card)
    convert(tmp_path / "ours" / "best.safetensors", tmp_path / "back")
    again, report = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not [key for key in report["missing_keys"] if not key.endswith("num_batches_tracked")]
    assert not report["unexpected_keys"]
    state = model.state_dict()
    unread = {"model.pixel_level_module.encoder.swin.layernorm.weight"}  # at its start anyway
    assert again.state_dict().keys() == state.keys()
    for name, value in again.state_dict().items():
        assert name in unread or torch.equal(value, state[name]), name


def as_detectron2(detector: Detector, found: Converted) -> dict[str, np.ndarray[Any, Any]]:
    """Our weights under the names of Mask2Former's own code."""
    state = turned(detector.state_dict(), found.recipe.detector)
    links = link_up(state, detectron2(found.recipe.detector), found.recipe.detector.decoder.layers)
    assert not missing(state, links)
    return {
        k: v.numpy()
        for k, v in as_convolutions(to_theirs(state, links)).items()
        if "static_query" not in k
    }


@pytest.fixture(scope="module")
def released() -> Converted:
    recipe = small("mask2former_r50").override(
        [
            *("detector.backbone.name=resnet50", "detector.backbone.norm=frozen_norm"),
            *("detector.encoder.heads=8", "detector.decoder.heads=8"),
        ]
    )
    detector = build_detector(recipe.detector, 80)
    classes = ClassMap(tuple(range(80)), tuple(map(str, range(80))))
    return Converted(detector.state_dict(), recipe, classes, ())


@torch.no_grad()
def test_a_pickle_of_its_own_code_is_read(released: Converted, tmp_path: Path) -> None:
    detector = ours(released)
    weights = as_detectron2(detector, released)
    assert weights["sem_seg_head.pixel_decoder.adapter_1.weight"].shape == (64, 256, 1, 1)
    path = tmp_path / "model_final.pkl"
    for protocol in (2, 4):  # as released, and as of today
        path.write_bytes(pickle.dumps({"model": weights, "__author__": "third_party"}, protocol))
        found = load_foreign(path)
        assert (found.recipe.detector.backbone.name, found.recipe.detector.queries.count) == (
            "resnet50",
            12,
        )
        assert found.classes.names[0] == "person"
        assert found.weights.keys() == released.weights.keys() - {
            k for k in released.weights if k.endswith("num_batches_tracked")
        }
        pixels = torch.randn(1, 3, 64, 96)
        for found_part, expected in zip(
            masks_of(ours(found), pixels), masks_of(detector, pixels), strict=True
        ):
            assert torch.equal(found_part, expected)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))

    def __init__(self, path: str) -> None:
        self.path = path


def test_a_pickle_can_run_nothing(tmp_path: Path) -> None:
    path, touched = tmp_path / "bad.pkl", tmp_path / "touched"
    path.write_bytes(pickle.dumps({"model": {"a": Malicious(str(touched))}}))
    with pytest.raises(UserError, match=r"bad\.pkl: not a pickle of arrays \(it asks for "):
        load_foreign(path)
    assert not touched.exists()
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a pickle of arrays"):
        load_foreign(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pre_norm": True}, "pre_norm"), ({"feature_strides": [4, 8, 16]}, "feature_strides")],
)
def test_what_ours_has_not_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = transformers.Mask2FormerConfig(backbone_config=backbone("resnet"), **(SIZES | changes))
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_foreign(tmp_path)
