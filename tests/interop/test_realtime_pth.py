"""Files with the names of RT-DETR's, RT-DETRv2's,
LW-DETR's and RF-DETR's authors, of random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detrellis.errors import UserError
from detrellis.interop import rtdetr_pth
from detrellis.interop.links import link_up, to_theirs
from detrellis.interop.load import load_foreign
from detrellis.interop.lwdetr_names import KEY_BIAS, authors_table
from detrellis.recipes import Recipe, find_recipe
from detrellis.recipes.detector import DetectorConfig

from ..small import resized
from .test_dfine import CLASSES, weights_of

CAE = {"width": 24, "heads": 12, "windowed": (0, 1, 3, 6, 7, 9), "taps": (3, 5, 6, 10)}
DINOV2 = {"width": 64, "heads": 1, "grid": 8}


def small(name: str, **parts: Any) -> Recipe:
    recipe = find_recipe(name).untrained()
    return recipe.model_copy(update={"detector": resized(recipe.detector, width=64, **parts)})


def save(
    path: Path, theirs: dict[str, Tensor], averaged: str, arguments: dict[str, Any] | None = None
) -> Path:
    """As a training of theirs does, with worse weights that are not the averaged ones."""
    worse = {name: torch.zeros_like(value) for name, value in theirs.items()}
    average = {"ema": {"module": theirs, "updates": 3}} if averaged == "ema" else {averaged: theirs}
    torch.save(
        {
            "model": worse,
            **average,
            **({"args": argparse.Namespace(**arguments)} if arguments else {}),
        },
        path,
    )
    return path


def check(
    path: Path, detector: DetectorConfig, weights: dict[str, Tensor], ignored: tuple[str, ...] = ()
) -> Recipe:
    found = load_foreign(path, classes=CLASSES)
    assert found.recipe.detector == detector
    for key, value in weights.items():
        assert torch.equal(found.weights[key], value), key
    assert not [name for name in found.skipped if not name.startswith(ignored)]
    return found.recipe


def first_version(name: str) -> str:
    """What RT-DETR's first code calls a tensor of the second one."""
    for part, place in (("conv", "0"), ("norm", "1"), ("proj", "0")):
        name = name.replace(f"enc_output.{part}.", f"enc_output.{place}.")
        if name.startswith("encoder.input_proj."):
            name = name.replace(f".{part}.", f".{place}.")
    return name


@pytest.mark.parametrize("name", ["rtdetr-r50", "rtdetrv2-r18"])
def test_rtdetr(name: str, tmp_path: Path) -> None:
    points = (3, 6, 3) if "v2" in name else 4
    sizes = {"encoder": {"hidden": 40, "inner": 48}, "decoder": {"hidden": 56, "layers": 2}}
    detector = small(name, **sizes, cross_attention={"points": points}).detector
    weights = weights_of(find_recipe(name).model_copy(update={"detector": detector}))
    theirs = to_theirs(weights, link_up(weights, rtdetr_pth.table(detector), 2))
    theirs["decoder.denoising_class_embed.weight"] = torch.randn(5, 64)
    theirs["decoder.anchors"], theirs["decoder.valid_mask"] = (
        torch.randn(1, 9, 4),
        torch.ones(1, 9, 1),
    )
    if "v2" in name:
        assert isinstance(points, tuple)
        theirs[rtdetr_pth.POINTS] = torch.tensor(
            [1 / count for count in points for _ in range(count)]
        )
        theirs["decoder.decoder.layers.1.cross_attn.num_points_scale"] = theirs[rtdetr_pth.POINTS]
    else:
        theirs = {first_version(key): value for key, value in theirs.items()}
        assert "encoder.input_proj.2.1.running_mean" in theirs
    assert "backbone.res_layers.0.blocks.0.short.conv.weight" in theirs
    assert "backbone.res_layers.1.blocks.0.short.conv.norm.running_var" in theirs
    expected = resized(detector, queries={"count": 300, "empty_compete": True}, top_k=300)
    path = save(tmp_path / "rtdetr.pth", theirs, "ema")
    check(
        path,
        expected,
        weights,
        ("decoder.denoising", "decoder.anchors", "decoder.valid_mask", "decoder.decoder"),
    )


@pytest.mark.parametrize("name", ["lwdetr-small", "lwdetr-large", "rfdetr-nano", "rfdetr-small"])
def test_lwdetr_and_rfdetr(name: str, tmp_path: Path) -> None:
    with_arguments = name in ("lwdetr-large", "rfdetr-small")
    given: dict[str, Any] = (
        {"sa_nheads": 4, "ca_nheads": 8} if with_arguments else {"sa_nheads": 2, "ca_nheads": 4}
    )
    decoder = {"hidden": 40, "heads": given["sa_nheads"], "cross_heads": given["ca_nheads"]}
    recipe = small(
        name,
        backbone=CAE if name.startswith("lw") else DINOV2,
        decoder=decoder,
        queries={"count": 6},
        top_k=6,
    )
    if with_arguments and name.startswith("lw"):
        given |= {
            "window_block_indexes": [0, 2],
            "out_feature_indexes": [1, 3, 5, -1],
            "drop_path": 0.1,
        }
        recipe = recipe.override(
            ["detector.backbone.windowed=[0, 2]", "detector.backbone.taps=[2, 4, 6, 10]"]
        )
    elif with_arguments:
        given |= {"num_windows": 4, "resolution": 320}
        recipe = recipe.override("detector.backbone.windows=4")
    weights = weights_of(recipe)
    if name.startswith("lw"):  # whose keys have no bias
        for key in (key for key in weights if key.endswith("attn.qkv.bias")):
            weights[key][24:48] = 0
    theirs = to_theirs(
        weights, link_up(weights, authors_table(recipe.detector), recipe.detector.decoder.layers)
    )
    theirs = {
        key: value for key, value in theirs.items() if not key.endswith(tuple(KEY_BIAS.values()))
    }
    for key in ("query_feat.weight", "refpoint_embed.weight"):
        theirs[key] = torch.cat([theirs[key], torch.randn_like(theirs[key])])
    further = {key: value for key, value in theirs.items() if key.startswith("transformer.enc_out")}
    theirs |= {key.replace(".0.", ".1.", 1): value for key, value in further.items()}
    if name.startswith("lw"):
        assert "backbone.0.encoder.blocks.9.attn.q_bias" in theirs
        assert ("backbone.0.projector.stages_sampling.0.0.0.weight" in theirs) == (
            name == "lwdetr-large"
        )
    path = save(tmp_path / "lwdetr.pth", theirs, "ema_model", given if with_arguments else None)
    found = check(path, recipe.detector, weights, ("transformer.enc_out",))
    assert found.schemes.group is not None
    assert found.schemes.group.k == 2
    if name.startswith("rf"):
        side = 320 if with_arguments else 128
        assert found.data.size == (side, side)


def test_what_is_not_theirs_is_refused(tmp_path: Path) -> None:
    """A backbone that no recipe has, and a file that lacks the tensor of a size."""
    detector = small("rtdetr-r18").detector
    weights = weights_of(find_recipe("rtdetr-r18").model_copy(update={"detector": detector}))
    theirs = to_theirs(
        weights, link_up(weights, rtdetr_pth.table(detector), detector.decoder.layers)
    )
    wrong = {
        key.replace("res_layers.3.blocks.1", "res_layers.3.blocks.2"): value
        for key, value in theirs.items()
    }
    wrong |= {key: value for key, value in theirs.items() if "res_layers.3" in key}
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"\[2, 2, 2, 3\]"):
        load_foreign(tmp_path / "wrong.pth")
    torch.save(
        {key: value for key, value in theirs.items() if "linear1" not in key}, tmp_path / "less.pth"
    )
    with pytest.raises(UserError, match="linear1"):
        load_foreign(tmp_path / "less.pth")
