"""State dicts of the reference repositories, and detrex's of DINO."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detrellis.data.classes import ClassMap
from detrellis.errors import UserError
from detrellis.interop.links import link_up, to_theirs
from detrellis.interop.load import load_foreign
from detrellis.interop.reference_names import table
from detrellis.recipes import Recipe
from detrellis.recipes.network import build_detector

from ..small import images, with_own_backbone

FAMILIES = [
    "detr_r50",
    "conditional_detr_r50",
    "dab_detr_r50",
    "dn_detr_r50",
    "deformable_detr_r50",
    "deformable_detr_r50_refine",
    "deformable_detr_r50_two_stage",
    "deformable_detr_r50_two_stage_plus",
    "dab_deformable_detr_r50",
    "dn_deformable_detr_r50",
    "dino_r50",
    "dino_r50_5scale",
]
CLASSES = 6
HEADS = {"nheads": 4}  # no shape tells


def frozen(recipe: Recipe) -> Recipe:
    """As published: norms frozen."""
    backbone = recipe.detector.backbone.model_copy(update={"norm": "frozen"})
    return recipe.model_copy(
        update={"detector": recipe.detector.model_copy(update={"backbone": backbone})}
    )


def published(recipe: Recipe, *, detrex: bool = False) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A detector with random weights, and its state dict as the repository would save it."""
    torch.manual_seed(0)
    detector = build_detector(recipe.detector, CLASSES).eval()
    with torch.no_grad():
        for p in detector.parameters():
            p += 0.05 * torch.randn_like(p)
    state = detector.state_dict()
    theirs = to_theirs(
        state, link_up(state, table(recipe.detector, detrex), recipe.detector.decoder.layers)
    )
    if "unknown_label" in theirs:  # the last row of the label embedding
        unknown = theirs.pop("unknown_label")
        theirs["label_enc.weight"] = torch.cat([torch.randn(CLASSES, unknown.shape[1]), unknown])
    elif recipe.schemes.dn or recipe.schemes.cdn:
        theirs["label_enc.weight"] = torch.randn(CLASSES + 1, recipe.detector.width)
    if recipe.detector.decoder.refine != "none" and not detrex:
        theirs |= {
            f"transformer.decoder.{k}": v for k, v in theirs.items() if k.startswith("bbox_embed.")
        }
    theirs["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(3)
    return detector, theirs


@torch.no_grad()
def check(path: Path, detector: torch.nn.Module, recipe: Recipe) -> None:
    found = load_foreign(path)
    expected = recipe.detector.model_dump() | {"top_k": found.recipe.detector.top_k}
    expected["backbone"]["pretrained"] = False
    if recipe.detector.two_stage:
        expected["queries"]["empty_compete"] = True
    assert found.recipe.detector.model_dump() == expected
    assert len(found.classes) == CLASSES
    rebuilt = build_detector(found.recipe.detector, CLASSES).eval()
    rebuilt.load_state_dict(dict(found.weights))
    for one, other in zip(detector(images())[:3], rebuilt(images())[:3], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_recognised_by_its_names(name: str, tmp_path: Path) -> None:
    recipe = frozen(with_own_backbone(name))
    detector, theirs = published(recipe)
    count = recipe.detector.queries.count
    arguments = argparse.Namespace(**HEADS, num_queries=count)
    torch.save({"model": theirs, "args": arguments, "epoch": 49}, tmp_path / "checkpoint.pth")
    check(tmp_path / "checkpoint.pth", detector, recipe)


@pytest.mark.parametrize("fusion", [False, True], ids=["DINO", "Stable-DINO"])
def test_detrex(fusion: bool, tmp_path: Path) -> None:
    recipe = frozen(with_own_backbone("dino_r50")).override(
        [
            *(
                "detector.backbone.name=resnet50",
                "detector.encoder.heads=8",
                "detector.decoder.heads=8",
            ),
            *("detector.decoder.shared_heads=false", "detector.position_temperature=10000.0"),
            *("detector.position_offset=-0.5", f"detector.encoder.fusion={fusion}"),
        ]
    )
    detector, theirs = published(recipe, detrex=True)
    assert "backbone.res3.0.conv2.norm.running_var" in theirs
    torch.save({"model": {f"module.{k}": v for k, v in theirs.items()}}, tmp_path / "model.pth")
    check(tmp_path / "model.pth", detector, recipe)


def test_of_h_detr_only_the_one_to_one_queries_are_kept(tmp_path: Path) -> None:
    recipe = frozen(with_own_backbone("deformable_detr_r50_two_stage_plus"))
    detector, weights = published(recipe)
    further = torch.randn(30, recipe.detector.width)
    weights["query_embed.weight"] = torch.cat([weights["query_embed.weight"], further])
    arguments = argparse.Namespace(num_queries_one2one=12, num_queries_one2many=30, **HEADS)
    torch.save({"model": weights, "args": arguments}, tmp_path / "hdetr.pth")
    check(tmp_path / "hdetr.pth", detector, recipe)


@pytest.mark.parametrize(
    "name",
    ["conditional_detr_r50", "dab_detr_r50", "dab_deformable_detr_r50", "deformable_detr_r50"],
)
def test_of_groups_only_the_first_is_kept(name: str, tmp_path: Path) -> None:
    recipe = frozen(with_own_backbone(name))
    detector, weights = published(recipe)
    for key in ("query_embed.weight", "refpoint_embed.weight", "tgt_embed.weight"):
        if key in weights:
            further = torch.randn(24, *weights[key].shape[1:])
            weights[key] = torch.cat([weights[key], further])
    torch.save(
        {"model": weights, "args": argparse.Namespace(group_detr=3, **HEADS)},
        tmp_path / "group.pth",
    )
    check(tmp_path / "group.pth", detector, recipe)


def test_dilation_is_said_or_stands_in_the_arguments(tmp_path: Path) -> None:
    recipe = frozen(with_own_backbone("detr_r50_dc5"))
    _, theirs = published(recipe)
    torch.save({"model": theirs}, tmp_path / "bare.pth")
    torch.save({"model": theirs, "args": argparse.Namespace(dilation=True)}, tmp_path / "with.pth")
    assert not load_foreign(tmp_path / "bare.pth").recipe.detector.backbone.dilation
    assert load_foreign(tmp_path / "bare.pth", dilation=True).recipe.detector.backbone.dilation
    assert load_foreign(tmp_path / "with.pth").recipe.detector.backbone.dilation


def test_classes_are_named_by_coco_or_by_the_user(tmp_path: Path) -> None:
    recipe = frozen(with_own_backbone("conditional_detr_r50"))
    for count in (91, 80, 3):
        state = build_detector(recipe.detector, count).state_dict()
        theirs = to_theirs(state, link_up(state, table(recipe.detector, False), 2))
        torch.save(theirs, tmp_path / f"{count}.pth")
    raw = load_foreign(tmp_path / "91.pth").classes
    assert (raw.names[1], raw.names[90], raw.names[12], raw.ids[90]) == (
        "person",
        "toothbrush",
        "N/A 12",
        90,
    )
    dense = load_foreign(tmp_path / "80.pth").classes
    assert (dense.names[79], dense.ids[79], dense.names[0]) == ("toothbrush", 90, "person")
    assert load_foreign(tmp_path / "3.pth").classes.names == ("class 0", "class 1", "class 2")
    own = ClassMap((7, 8, 20), ("a", "b", "c"))
    assert load_foreign(tmp_path / "3.pth", classes=own).classes == own
    with pytest.raises(UserError, match="3 classes are named, the weights have 80"):
        load_foreign(
            tmp_path / "80.pth", classes=own.from_categories([{"id": i} for i in (1, 2, 99)])
        )


class Malicious:
    """What a pickle may do when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_bad_files_are_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = frozen(with_own_backbone("detr_r50"))
    _, theirs = published(recipe)
    good = tmp_path / "good.pth"
    torch.save(theirs, good)
    cases = {"truncated": good.read_bytes()[:5000], "empty": b"", "text": b"<html>Not found</html>"}
    for name, content in cases.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.pth: (not a whole file|an empty file)"):
            load_foreign(tmp_path / f"{name}.pth")
    torch.save({"model": theirs, "hook": Malicious()}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"code\.pth: holds Python objects"):
        load_foreign(tmp_path / "code.pth")
    assert "executed" not in capsys.readouterr().out
    torch.save({"a": 1}, tmp_path / "nothing.pth")
    with pytest.raises(UserError, match="holds no tensors"):
        load_foreign(tmp_path / "nothing.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: these names belong to no model"):
        load_foreign(tmp_path / "other.pth")
    for key in (
        "transformer.encoder.layers.0.linear1.weight",
        "class_embed.weight",
        "query_embed.weight",
    ):
        torch.save({k: v for k, v in theirs.items() if k != key}, tmp_path / "sizeless.pth")
        with pytest.raises(UserError, match=rf"sizeless\.pth: {key} is missing"):
            load_foreign(tmp_path / "sizeless.pth")
    del theirs["transformer.decoder.layers.1.linear2.bias"]
    torch.save(theirs, tmp_path / "incomplete.pth")
    with pytest.raises(
        UserError,
        match=r"incomplete\.pth: transformer\.decoder\.layers\.1\.linear2\.bias is missing",
    ):
        load_foreign(tmp_path / "incomplete.pth")
    theirs["transformer.decoder.layers.1.linear2.bias"] = torch.full((64,), torch.nan)
    torch.save(theirs, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="not finite"):
        load_foreign(tmp_path / "nan.pth")
