"""What was stored before the recipes' fields moved still loads:
files of format 1, as the code of then wrote them.

`data/format1.tar.xz` holds, written with that code at seed 3 on five classes of
`write_shapes(train=4, val=2, size=(64, 64))`, on a frozen `test_resnet` whose large tensors are
thinned out so that they pack well:

* `sam`, `dab`, `mixed` and `detr`: weights by `save_weights`, of sam-detr-plus-r50-smca-dn,
  dab-detr-r50 with patterns, dino-r50 with co, group and align, detr-r50; `dab` is a run of one
  epoch by `train(..., epochs=1)`, with its state;
* `outputs.safetensors`: logits and boxes of each for `images(((64, 96), (48, 64)), seed=0)`, and of
  `dab` again after `resume(run, epochs=2)`;
* `study`: `plan.json` of `plan_schemes("tiny", "none,align+co", ..., epochs=4,
  override=OF_THE_STUDY)` and the `trial.json` of its first row;
* `recipes.json`: `model_dump(mode="json")` of every recipe, of every recipe with every scheme, and
  of `CHANGED`.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import detrellis
from detrellis.data.layout import resolve
from detrellis.data.shapes import write_shapes
from detrellis.engine.checkpoint import load_weights
from detrellis.errors import UserError
from detrellis.nn.pretrained import timm_statistics
from detrellis.recipes import RECIPES, dfine, find_recipe, lwdetr, mask2former, rivals, rtdetr, vit
from detrellis.recipes.backbones import RESNETS
from detrellis.recipes.build import build
from detrellis.recipes.migrate import FORMAT, migrated, read_recipe, renamed_parameters
from detrellis.recipes.scale import tiny_sized
from detrellis.schemes.config import SchemesConfig
from detrellis.study.plan import read_plan
from detrellis.study.rows import plan_schemes
from detrellis.types import IMAGENET_MEAN, IMAGENET_STD

from ..small import images

# Recipes and schemes that format 1 did not have.
OTHERS = (*mask2former.RECIPES, *rtdetr.RECIPES, *dfine.RECIPES, *lwdetr.RECIPES)
RIVALS = ("ddq-dino-r50", *(name for name in rivals.RECIPES if not name.startswith("rank")))
LARGE = (*vit.RECIPES, *(name for name in RECIPES if "-lsj" in name or "-lvis" in name))
SINCE = (
    "mask-dino-r50",
    "small",
    "dense",
    "rank",
    "federated",
    "ms",
    "dac",
    "sqr",
    "rank-h-deformable-detr-r50",
    *RIVALS,
    *LARGE,
    *OTHERS,
)
OF_THE_STUDY = ["optim.lr=1e-3", "detector.queries.count=30"]
# What recipes have changed since.
THEN = {
    "tiny": [
        "data.match_orientation=false",
        "data.group_by_aspect=false",
        "detector.size_divisor=1",
        "optim.lr=4e-4",
        "schedule.flat=0",
        "loss.classification=focal",
        "detector.queries.content_from=learned",
        "detector.queries.distinct=null",
        "detector.decoder.distinct=null",
    ],
    "stable-dino-r50": ["detector.encoder.fusion=false"],
}
# A recipe, and what it was changed in, as this version says it.
CHANGED: dict[str, tuple[str, list[str]]] = {
    "learned": (
        "deformable-detr-r50",
        [
            *(
                "detector.queries.count=7",
                "detector.queries.content=zero",
                "detector.cross_attention.points=3",
            ),
            *(
                "detector.encoder.points=2",
                "detector.encoder.heads=4",
                "detector.encoder.hidden=33",
            ),
            *(
                "detector.encoder.levels=5",
                "detector.decoder.hidden=44",
                "detector.decoder.refine=detached",
            ),
        ],
    ),
    "anchors": (
        "dn-deformable-detr-r50",
        [
            *(
                "detector.queries.count=9",
                "detector.queries.content=shared",
                "detector.queries.patterns=2",
            ),
            *("detector.queries.indicator=false", "detector.queries.fixed_centres=true"),
            *(
                "detector.queries.frozen_boxes=true",
                "detector.cross_attention.position_scale=false",
            ),
            *("detector.encoder.layers=3", "detector.encoder.heads=4"),
            *("detector.decoder.layers=4", "detector.decoder.heads=4"),
        ],
    ),
    "proposals": (
        "deformable-detr-r50-two-stage",
        [
            *("detector.queries.proposal_targets=classes", "detector.queries.empty_compete=true"),
            *("detector.decoder.final_norm=true", "detector.decoder.shared_heads=true"),
            *("detector.eps=1e-4", "detector.iou_branch=root", "detector.soft_nms=0.5"),
        ],
    ),
    "mixed": (
        "dino-r50",
        [
            *("detector.queries.position=queries", "detector.queries.proposal_targets=objectness"),
            "detector.width=128",
            *("detector.position_temperature=30.0", "detector.position_offset=0.25"),
        ],
    ),
    "mixed, scaled": ("dino-r50", ["detector.cross_attention.position_scale=true"]),
    "dense": (
        "conditional-detr-r50",
        [
            *(
                "detector.encoder.neck_norm=true",
                "detector.encoder.hidden=48",
                "detector.decoder.hidden=48",
            ),
            *(
                "detector.encoder.position_scale=true",
                "detector.activation=gelu",
                "detector.top_k=9",
            ),
            "detector.dropout=0.25",
        ],
    ),
    "intra-scale": (
        "smca-detr-ms-r50",
        [
            "detector.encoder.levels=4",
            "detector.cross_attention.smca=false",
            "detector.scores=softmax",
        ],
    ),
    "semantic": (
        "sam-detr-plus-r50-smca",
        [
            *("detector.cross_attention.resample=max", "detector.cross_attention.keypoints=2"),
            *("detector.cross_attention.reweight=false", "detector.cross_attention.search=image"),
            *("detector.cross_attention.zero_init=true", "detector.encoder.points=6"),
        ],
    ),
    "schemes": (
        "dino-r50",
        [
            "schemes.dn={groups: 2, total: 50, label_noise: 0.1, box_noise: 0.3, padded_background: true, sees: all}",
            "schemes.cdn={number: 7, label_noise: 0.3, box_noise: 0.7, sees: all}",
            "schemes.hybrid={k: 3, queries: 12, weight: 0.5, divisor: boxes}",
            "schemes.co={branches: [paa, gfl], head_weight: 3.0, query_weight: 0.5, convolutions: 2,"
            " max_queries: 100, pad: mask, features: true, vector: true, aligned: true}",
            "schemes.align={k: 5, k_encoder: 3, k_last: 2, alpha: 0.5, tau: 2.0, gamma: 3.0, floor: 0.02,"
            " classification: base, rank_boxes: false, iou_eps: 1e-6}",
            "schemes.stable={supervised: false, modulated: false, classes: 4.0, beta: 0.25}",
            "schemes.group={k: 4, reduction: sum, proposals: split, contents: copied, distances: true}",
        ],
    ),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of format 1."""
    out = tmp_path_factory.mktemp("format1")
    with tarfile.open(Path(__file__).parent / "data" / "format1.tar.xz") as archive:
        archive.extractall(out, filter="data")
    return out


@pytest.fixture(scope="module")
def recipes(stored: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stored / "recipes.json").read_text())
    return found


def assert_outputs(run: Path, stored: Path, name: str, tolerance: float = 1e-4) -> None:
    expected: dict[str, Tensor] = load_file(stored / "outputs.safetensors")
    detector = detrellis.load(run).detector.eval()
    with torch.no_grad():
        output = detector(images(((64, 96), (48, 64)), seed=0))
    for found, what in ((output.logits[-1], "logits"), (output.boxes[-1], "boxes")):
        torch.testing.assert_close(found, expected[f"{name}.{what}"], atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", ["sam", "dab", "mixed", "detr"])
def test_weights_detect_what_they_did(stored: Path, name: str) -> None:
    assert_outputs(stored / name, stored, name)


def test_a_run_goes_on(stored: Path, tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "shapes", train=4, val=2, size=(64, 64))
    run = stored / "dab"
    assert detrellis.resume(run, data=data, epochs=2, workers=0).finished
    assert_outputs(run / "last.safetensors", stored, "dab-resumed", 1e-3)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in SINCE])
def test_recipes_are_what_they_were(recipes: dict[str, Any], name: str) -> None:
    recipe = find_recipe(name).override(THEN.get(name, []))
    recipe = recipe.model_copy(update={"about": recipes[name]["about"]})  # words may change
    backbone = recipe.detector.backbone
    if backbone.kind != "hierarchical" or backbone.name not in RESNETS:
        recipe = recipe.with_statistics(IMAGENET_MEAN, IMAGENET_STD)
    assert read_recipe(recipes[name], 1) == recipe
    every = recipe.with_schemes(
        ["none", *(scheme for scheme in SchemesConfig.model_fields if scheme not in SINCE)]
    )
    every = every.replace(loss=recipe.loss)  # which schemes did not replace then
    assert read_recipe(recipes[f"{recipe.name} with every scheme"], 1) == every


@pytest.mark.parametrize("name", CHANGED)
def test_values_that_are_not_the_default_stay(recipes: dict[str, Any], name: str) -> None:
    recipe, changes = CHANGED[name]
    expected = find_recipe(recipe).override(changes)
    assert expected != find_recipe(recipe)
    assert read_recipe(recipes[name], 1) == expected


def test_names_of_format_2_are_read() -> None:
    """`format2.json`: the `model_dump(mode="json")` of this recipe,
    as the code of then wrote it.
    """
    stored = json.loads((Path(__file__).parent / "data" / "format2.json").read_text())
    changes = [
        "schemes.co.head_weight=3",
        "schemes.co.query_weight=0.5",
        "schemes.co.max_queries=40",
    ]
    assert read_recipe(stored, 2) == find_recipe("co-dino-r50").override(changes)


def test_parameters_of_format_2_are_read() -> None:
    model = build(
        tiny_sized(find_recipe("co-dino-r50")).untrained().with_schemes("co=atss+mask"), 2, seed=0
    )
    state = model.state_dict()
    old = {
        name.replace(".quality.", ".judge.").replace(".tower.", ".read."): v
        for name, v in state.items()
    }
    # ATSS's centerness, the RPN's convolution, and the masks' four
    assert len(old.keys() - state.keys()) == 12
    assert renamed_parameters(old).keys() == state.keys()


def test_contents_that_are_tokens_are_read_from_format_3() -> None:
    for features, content in ((True, "memory"), (False, "learned")):
        old = json.loads(
            find_recipe("ddq-dino-r50").model_dump_json(
                exclude={"detector": {"queries": {"content_from"}}}
            )
        )
        old["detector"]["queries"]["features"] = features
        assert read_recipe(old, 3).model_dump()["detector"]["queries"]["content_from"] == content


@pytest.mark.parametrize("again", [True, False])
def test_checkpointing_of_an_encoder_is_read_from_format_5(again: bool) -> None:
    """Since then it is the decoder's, too, and none of the detector's."""
    old = json.loads(find_recipe("dino-r50").model_dump_json(exclude={"optim": {"checkpointing"}}))
    old["detector"]["encoder"]["checkpointing"] = again
    assert read_recipe(old, 5).optim.checkpointing == again


def test_what_this_version_stores_it_reads_as_it_is() -> None:
    dumped = json.loads(find_recipe("dino-r50").model_dump_json())
    assert migrated(dumped, FORMAT) == dumped


def test_older_runs_keep_the_statistics_that_they_were_trained_with(stored: Path) -> None:
    """ImageNet's, whatever the backbone:
    `test_resnet`, which `sam` has, is given other ones by timm.
    """
    card = load_weights(stored / "sam")[1]
    assert card.recipe.detector.backbone.name == "test_resnet"
    assert (card.recipe.data.mean, card.recipe.data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert timm_statistics("test_resnet")[0] != IMAGENET_MEAN
    recipe = json.loads(
        find_recipe("dino-swin-l").model_dump_json(exclude={"data": {"mean", "std"}})
    )
    assert read_recipe(recipe, 2).data.mean == IMAGENET_MEAN
    assert read_recipe(recipe, FORMAT).data.mean is None
    recipe["data"]["mean"] = [0.5, 0.4, 0.3]
    assert read_recipe(recipe, 2).data.mean == (0.5, 0.4, 0.3)


def test_a_study_goes_on(stored: Path, tmp_path: Path) -> None:
    source = resolve(write_shapes(tmp_path / "shapes", train=4, val=2, size=(64, 64)))
    plan = plan_schemes(
        "tiny", "none,align+co", source, seeds=(0,), epochs=4, override=THEN["tiny"] + OF_THE_STUDY
    )
    file = stored / "study" / "plan.json"
    old = json.loads(file.read_text())
    file.write_text(json.dumps(old | {"data": json.loads(json.dumps(dict(plan.data)))}))
    plan.check(stored / "study")
    order = json.loads((stored / "study" / "trial.json").read_text())
    assert read_recipe(order["recipe"], order.get("format", 1)) == plan.rows[0].recipe
    file.write_text(json.dumps(old | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match="written by a newer Detrellis"):
        read_plan(stored / "study")
