"""Co-DETR's checkpoints of Co-DINO on EVA-02's ViT-L:
tensors with the names and shapes of its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from detrellis.errors import UserError
from detrellis.interop.codetr import recipe_of
from detrellis.interop.load import load_foreign
from detrellis.recipes import find_recipe
from detrellis.recipes.network import build_detector
from detrellis.types import ImageBatch

Shapes = dict[str, tuple[int, ...]]


class Sizes(NamedTuple):
    depth: int
    channels: int
    grid: int
    width: int
    hidden: int
    queries: int
    classes: int
    layers: int


RELEASED = Sizes(24, 1024, 32, 256, 2048, 1500, 80, 6)
SMALL = Sizes(2, 64, 4, 64, 96, 30, 5, 2)


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def vit(s: Sizes) -> Shapes:
    d, hidden = s.channels, s.channels * 8 // 3
    shapes: Shapes = {"pos_embed": (1, 1 + s.grid**2, d), "patch_embed.proj.weight": (d, 3, 16, 16)}
    shapes |= {"patch_embed.proj.bias": (d,), **norm("out_norm", d)}
    for i in range(s.depth):
        block = f"blocks.{i}"
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{block}.attn.{name}.weight"] = (d, d)
        shapes |= {
            f"{block}.attn.q_bias": (d,),
            f"{block}.attn.v_bias": (d,),
            **linear(f"{block}.attn.proj", d, d),
        }
        shapes |= {
            **norm(f"{block}.norm1", d),
            **norm(f"{block}.norm2", d),
            **norm(f"{block}.mlp.ffn_ln", hidden),
        }
        shapes |= {**linear(f"{block}.mlp.w1", hidden, d), **linear(f"{block}.mlp.w2", hidden, d)}
        shapes |= linear(f"{block}.mlp.w3", d, hidden)
    return {f"backbone.{name}": shape for name, shape in shapes.items()}


def pyramid(s: Sizes) -> Shapes:
    """Convolutions, by their place in each level's sequence:
    outputs, inputs, kernel; a norm follows each.
    """
    d, w = s.channels, s.width
    levels = {
        "p2": [(1, d // 2, d, 3), (5, d // 4, d // 2, 3), (8, w, d // 4, 1), (11, w, w, 3)],
        "p3": [(1, d // 2, d, 3), (4, w, d // 2, 1), (7, w, w, 3)],
        "p4": [(0, w, d, 1), (3, w, w, 3)],
        "p5": [(1, w, d, 1), (4, w, w, 3)],
        "p6": [(1, d, d, 3), (4, w, d, 1), (7, w, w, 3)],
    }
    shapes: Shapes = {}
    for level, rows in levels.items():
        for place, outputs, inputs, kernel in rows:
            shapes[f"neck.{level}.{place}.weight"] = (outputs, inputs, kernel, kernel)
            shapes |= norm(f"neck.{level}.{place + 1}", outputs)
    return shapes


def sampling(name: str, width: int) -> Shapes:
    """Of 8 heads, 5 levels and 4 points."""
    shapes = {
        **linear(f"{name}.sampling_offsets", 320, width),
        **linear(f"{name}.attention_weights", 160, width),
    }
    return (
        shapes
        | linear(f"{name}.value_proj", width, width)
        | linear(f"{name}.output_proj", width, width)
    )


def transformer(s: Sizes) -> Shapes:
    w = s.width
    shapes: Shapes = {"level_embeds": (5, w), "query_embed.weight": (s.queries, w)}
    shapes |= {
        **linear("enc_output", w, w),
        **norm("enc_output_norm", w),
        **norm("decoder.norm", w),
    }
    shapes |= {
        **linear("decoder.ref_point_head.0", w, 2 * w),
        **linear("decoder.ref_point_head.2", w, w),
    }
    for part, norms in (("encoder", 2), ("decoder", 3)):
        for layer in (f"{part}.layers.{i}" for i in range(s.layers)):
            shapes |= {k: v for i in range(norms) for k, v in norm(f"{layer}.norms.{i}", w).items()}
            shapes |= linear(f"{layer}.ffns.0.layers.0.0", s.hidden, w) | linear(
                f"{layer}.ffns.0.layers.1", w, s.hidden
            )
            shapes |= sampling(f"{layer}.attentions.{norms - 2}", w)
            if part == "decoder":
                own = f"{layer}.attentions.0.attn"
                shapes |= {f"{own}.in_proj_weight": (3 * w, w), f"{own}.in_proj_bias": (3 * w,)}
                shapes |= linear(f"{own}.out_proj", w, w)
    return {f"query_head.transformer.{name}": shape for name, shape in shapes.items()}


def heads(s: Sizes) -> Shapes:
    """Of the layers, and of the proposals."""
    shapes: Shapes = {}
    for i in range(s.layers + 1):
        shapes |= linear(f"query_head.cls_branches.{i}", s.classes, s.width)
        for place, outputs in ((0, s.width), (2, s.width), (4, 4)):
            shapes |= linear(f"query_head.reg_branches.{i}.{place}", outputs, s.width)
    return shapes


def training(s: Sizes) -> Shapes:
    """Some of what a detector has no place for."""
    return {
        "query_head.label_embedding.weight": (s.classes, s.width),
        **linear("query_head.transformer.aux_pos_trans.0", s.width, 2 * s.width),
        "rpn_head.rpn_conv.weight": (s.width, s.width, 3, 3),
        "bbox_head.0.atss_cls.weight": (s.classes, s.width, 3, 3),
    }


def released(s: Sizes) -> Shapes:
    return vit(s) | pyramid(s) | transformer(s) | heads(s)


def test_the_released_sizes_are_the_recipe() -> None:
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in released(RELEASED).items()}
    found, ours = recipe_of(weights).detector, find_recipe("co-dino-vit-l").untrained().detector
    assert found == ours.replace(queries=ours.queries.replace(empty_compete=True))


def test_a_file_predicts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights: Mapping[str, torch.Tensor] = {
        name: torch.randn(shape) / 8 for name, shape in (released(SMALL) | training(SMALL)).items()
    }
    torch.save({"meta": {"epoch": 12}, "state_dict": weights}, tmp_path / "w.pth")
    found = load_foreign(tmp_path / "w.pth")
    assert set(found.skipped) == set(training(SMALL))
    detector = build_detector(found.recipe.detector, len(found.classes)).eval()
    detector.load_state_dict(dict(found.weights))
    state = detector.state_dict()
    for ours, theirs in {
        "queries.head.move.layers.2.bias": "query_head.reg_branches.2.4.bias",
        "decoder.heads.boxes.1.layers.1.weight": "query_head.reg_branches.1.2.weight",
        "decoder.layers.1.norm_cross.weight": "query_head.transformer.decoder.layers.1.norms.1.weight",
        "neck.pyramid.p2.5.weight": "neck.p2.5.weight",
    }.items():
        assert torch.equal(state[ours], weights[theirs])
    output = detector(ImageBatch(torch.randn(1, 3, 64, 80)))
    assert output.boxes.isfinite().all()
    torch.save(
        {"state_dict": {k: v for k, v in weights.items() if k != "neck.p6.1.weight"}},
        tmp_path / "w.pth",
    )
    with pytest.raises(UserError, match=r"neck\.p6\.1\.weight is missing"):
        load_foreign(tmp_path / "w.pth")
