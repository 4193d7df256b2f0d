"""Co-DETR's recipes: the settings of its released configurations."""

from __future__ import annotations

import pytest

from detrellis.recipes import RECIPES, find_recipe
from detrellis.schemes.collaborative.branches import build_branches
from detrellis.schemes.collaborative.rcnn import RCNN
from detrellis.schemes.config import CoConfig

# With data or a network of their own: test_large.py
LARGE = ("lsj", "lvis", "vit", "objects365", "finetune")
NAMES = [
    name for name in RECIPES if name.startswith("co-") and not any(word in name for word in LARGE)
]


def test_all_are_listed() -> None:
    ends = (
        "deformable-detr-r50",
        "deformable-detr-r50-k1",
        "dino-r50",
        "dino-r50-9enc",
        "dino-swin-l",
    )
    assert sorted(NAMES) == sorted(
        f"co-{end}" for end in (*ends, "conditional-detr-r50", "dab-detr-r50")
    )


@pytest.mark.parametrize("name", NAMES)
def test_branches_weights_and_schedule(name: str) -> None:
    recipe = find_recipe(name)
    branches = ("atss",) if name.endswith("-k1") else ("rcnn", "atss")
    defaults = {"head_weight": 2.0, "query_weight": 1.0, "convolutions": 1, "max_queries": 300}
    assert recipe.schemes.co == CoConfig.checked({"branches": branches} | defaults)
    epochs = 36 if name in ("co-conditional-detr-r50", "co-dab-detr-r50") else 12
    assert recipe.schedule.epochs == epochs
    assert recipe.schedule.drops == (pytest.approx(30 / 36 if epochs == 36 else 11 / 12),)
    assert recipe.optim.batch_size == 16
    assert recipe.name == name


@pytest.mark.parametrize("name", ["co-dino-r50", "co-dino-r50-9enc", "co-dino-swin-l"])
def test_co_dino(name: str) -> None:
    recipe = find_recipe(name)
    d = recipe.detector
    assert (recipe.loss.classification, recipe.loss.classes, d.soft_nms, recipe.optim.lr) == (
        "qfl",
        1.0,
        0.8,
        2e-4,
    )
    assert (d.queries.count, d.top_k, d.decoder.shared_heads, d.eps, d.position_temperature) == (
        900,
        300,
        False,
        1e-3,
        20.0,
    )
    assert d.level_strides == (4, 8, 16, 32, 64)
    assert recipe.schemes.cdn is not None
    assert (
        recipe.schemes.cdn.number,
        recipe.schemes.cdn.label_noise,
        recipe.schemes.cdn.box_noise,
    ) == (100, 0.5, 1.0)
    assert d.encoder.layers == (9 if name.endswith("9enc") else 6)
    assert d.backbone.drop_path == (0.3 if "swin" in name else 0.0)


def test_co_deformable_is_free_of_nms() -> None:
    recipe = find_recipe("co-deformable-detr-r50")
    assert recipe.detector == find_recipe("deformable-detr-r50-two-stage-plus").detector
    assert recipe.detector.soft_nms is None
    assert (recipe.loss.classification, recipe.loss.classes, recipe.optim.lr) == (
        "focal",
        2.0,
        2e-4,
    )
    assert recipe.detector.level_strides == (8, 16, 32, 64)


@pytest.mark.parametrize(("width", "samples", "hidden"), [(256, 512, 1024), (128, 128, 256)])
def test_regions_are_in_proportion_to_the_width(width: int, samples: int, hidden: int) -> None:
    config = find_recipe("co-deformable-detr-r50").override(f"detector.width={width}").detector
    adapter, (branch,) = build_branches(
        ("rcnn",), width, 5, config.level_strides, convolutions=1, regions="linear"
    )
    assert isinstance(branch, RCNN)
    assert adapter.strides == (8, 16, 32, 64, 128)
    assert branch.levels == 4  # the appended level is for proposals only
    assert (branch.samples, branch.head.second.out_features) == (samples, hidden)


def test_one_level_is_spread_to_five() -> None:
    for name in ("co-conditional-detr-r50", "co-dab-detr-r50"):
        config = find_recipe(name).override("detector.width=64").detector
        adapter, branches = build_branches(
            ("atss", "fcos", "atss"), 64, 5, config.level_strides, convolutions=1, regions="linear"
        )
        assert adapter.strides == (8, 16, 32, 64, 128)
        assert len(branches) == 3
