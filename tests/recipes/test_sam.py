"""SAM-DETR's recipes: sizes as published, what each adds, what combines, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detrellis.errors import UserError
from detrellis.nn.prior import AtLevel
from detrellis.nn.semantic import SemanticCrossAttention
from detrellis.recipes import RECIPES, find_recipe
from detrellis.recipes.build import build
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.network import build_cross_attention, build_detector
from detrellis.recipes.sam import sam_detector

from ..small import CLASSES, images, resized, small, targets

NAMES = [name for name in RECIPES if name.startswith("sam-")]
COCO = 91  # logits: the released code takes COCO's ids for classes


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def without_weights(config: DetectorConfig) -> nn.Module:
    """The detector on no device: shapes alone."""
    with torch.device("meta"):
        return build_detector(config, COCO)


@pytest.mark.parametrize(
    ("name", "normed", "expected"),
    [
        ("sam-detr-r50", True, 58_074_058),
        ("sam-detr-r50", False, 58_073_546),
        ("sam-detr-r50-smca", False, 58_073_546 + 49_248),
        ("sam-detr-r50-dc5", False, 58_073_546),
        ("sam-detr-plus-r50", False, 54_972_298),
        ("sam-detr-plus-r50-smca", False, 55_021_546),
    ],
)
def test_as_many_parameters_are_trained_as_the_released_code_says(
    name: str, normed: bool, expected: int
) -> None:
    config = find_recipe(name).untrained().detector
    config = resized(config, encoder={"neck_norm": True}) if normed else config
    detector = without_weights(config)
    assert trainable(detector) == expected
    assert trainable(detector.backbone) == 23_232_512
    layer = 4_248_144 + (49_248 // 6 if config.cross_attention.smca else 0)
    assert [trainable(part) for part in detector.decoder.layers] == [layer] * 6


@pytest.mark.parametrize("name", NAMES)
def test_names_say_what_is_added(name: str) -> None:
    recipe = find_recipe(name)
    detector, words = recipe.detector, name.split("-")
    queries = detector.queries
    assert queries.kind == "anchors"
    assert detector.cross_attention.smca == ("smca" in words)
    assert (recipe.schemes.dn is not None) == ("dn" in words)
    assert (queries.content, queries.indicator) == (
        ("shared", True) if "dn" in words else ("zero", False)
    )
    assert detector.backbone.dilation == ("dc5" in words)
    assert detector.encoder.levels == (3 if "plus" in words else 1)
    assert recipe.optim.batch_size == (8 if "dc5" in words else 16)
    assert {k: v for k, v in recipe.schemes if v is not None and k != "dn"} == {}
    base = find_recipe("-".join(w for w in words if w not in ("smca", "dn")))
    plain = {"queries": {"content": "zero", "indicator": False}, "cross_attention": {"smca": False}}
    assert resized(detector, **plain) == base.detector


def test_published_settings() -> None:
    for name in NAMES:
        recipe = find_recipe(name)
        loss, d = recipe.loss, recipe.detector
        assert (
            (loss.classes, loss.box, loss.giou)
            == (loss.cost_classes, loss.cost_box, loss.cost_giou)
            == (2, 5, 2)
        )
        assert (
            d.queries.count,
            d.dropout,
            d.decoder.hidden,
            d.top_k,
            d.eps,
            d.position_offset,
        ) == (
            300,
            0,
            2048,
            100,
            1e-5,
            -0.5,
        )
        assert (recipe.schedule.epochs, recipe.schedule.drops) == (12, (10 / 12,))
        assert (recipe.optim.lr, recipe.optim.scaled) == (1e-4, {"backbone": 0.1})
        assert d.capabilities >= {"sigmoid_scores", "box_queries"}


# Network parts


def test_layers_of_several_levels_read_them_from_coarse_to_fine() -> None:
    decoder = without_weights(find_recipe("sam-detr-plus-r50").untrained().detector).decoder
    assert all(isinstance(layer.cross_attention, AtLevel) for layer in decoder.layers)
    assert [layer.cross_attention.level for layer in decoder.layers] == [2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("keypoints", "heads"), [(None, 8), (1, 8), (2, 8), (4, 8), (8, 8), (16, 16)]
)
def test_keypoints_are_shared_or_add_heads(keypoints: int | None, heads: int) -> None:
    config = resized(
        sam_detector(), width=64, cross_attention={"keypoints": keypoints, "smca": True}
    )
    attention = build_cross_attention(config, 0)
    assert isinstance(attention, SemanticCrossAttention)
    assert attention.heads == attention.aligner.heads == heads
    assert attention.aligner.keypoints == (keypoints or 8)
    assert attention.aligner.find is not None
    last = attention.aligner.find[-1]
    assert isinstance(last, nn.Linear)
    assert last.out_features == 4 * (keypoints or 8)


@pytest.mark.parametrize(
    "override",
    [
        ["detector.cross_attention.keypoints=1", "detector.cross_attention.reweight=false"],
        ["detector.cross_attention.keypoints=8"],  # of 4 heads
        ["detector.cross_attention.resample=avg"],
        ["detector.cross_attention.resample=max", "detector.cross_attention.smca=true"],
        ["detector.cross_attention.search=image"],
        ["detector.cross_attention.zero_init=true"],
        ["detector.cross_attention.kind=dense"],  # no aligner: the first row of the ablation
    ],
)
@pytest.mark.parametrize("name", ["sam_detr_r50", "sam_detr_plus_r50"])
def test_ablations_train(name: str, override: list[str]) -> None:
    losses = step(build(small(name).override(override), CLASSES))
    assert torch.stack(losses).isfinite().all()


def step(model: nn.Module) -> list[torch.Tensor]:
    """Losses of a padded batch, with every gradient finite."""
    found: dict[str, torch.Tensor] = model(images(((64, 96), (64, 80))), targets((2, 3))).losses
    torch.stack(list(found.values())).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
    return list(found.values())


# Schemes


@pytest.mark.parametrize("name", ["sam_detr_r50", "sam_detr_plus_r50", "sam_detr_plus_r50_smca_dn"])
def test_all_schemes_together(name: str) -> None:
    model = build(small(name, ["align=2", "group=2", "dn", "co=atss"]), CLASSES)
    assert {s.name for s in model.training_schemes} == {"align", "group", "dn", "co"}
    model.train()
    assert torch.stack(step(model)).isfinite().all()


@pytest.mark.parametrize("name", ["smca_detr_r50", "smca_detr_ms_r50"])
def test_smca_by_itself_takes_what_needs_no_boxes(name: str) -> None:
    model = build(small(name, ["align=2", "group=2", "co=atss"]), CLASSES)
    assert torch.stack(step(model)).isfinite().all()
    with pytest.raises(UserError, match=r"scheme dn cannot train.*its queries are not boxes"):
        build(small(name, ["dn"]), CLASSES)


# Refusals


@pytest.mark.parametrize(
    ("name", "overrides", "parts"),
    [
        (
            "conditional-detr-r50",
            ["cross_attention.kind=semantic"],
            [
                "cross_attention.kind=semantic",
                "queries.kind=learned",
                "-o detector.queries.kind=anchors",
            ],
        ),
        (
            "dino-r50",
            ["cross_attention.kind=semantic"],
            [
                "cross_attention.kind=semantic",
                "queries.kind=mixed",
                "-o detector.queries.kind=anchors",
            ],
        ),
        (
            "smca-detr-r50",
            ["queries.kind=anchors"],
            [
                "smca",
                "cross_attention.kind=dense",
                "-o detector.queries.kind=learned",
                "refine=none",
            ],
        ),
        (
            "smca-detr-r50",
            ["decoder.refine=detached"],
            ["smca", "cross_attention.kind=dense", "refine=none"],
        ),
        (
            "sam-detr-r50",
            ["cross_attention.keypoints=3"],
            ["cross_attention.keypoints=3", "heads=8", "-o detector.cross_attention.keypoints=8"],
        ),
        (
            "sam-detr-r50",
            ["cross_attention.keypoints=12"],
            ["cross_attention.keypoints=12", "width=256"],
        ),
        (
            "sam-detr-plus-r50",
            ["encoder.kind=dense"],
            ["encoder.kind=dense", "-o 'detector.backbone.strides=[32]'"],
        ),
    ],
)
def test_undefined_combinations_are_refused(
    name: str, overrides: list[str], parts: list[str]
) -> None:
    config = (
        find_recipe(name).untrained().override([f"detector.{text}" for text in overrides]).detector
    )
    with pytest.raises(UserError) as error:
        without_weights(config)
    assert all(part in str(error.value) for part in [*parts, "-o "])


@pytest.mark.parametrize(
    ("name", "override", "kind"),
    [
        ("deformable-detr-r50", "cross_attention.smca=true", "cross_attention.kind=deformable"),
        ("conditional-detr-r50", "cross_attention.smca=true", "cross_attention.kind=conditional"),
        ("detr-r50", "cross_attention.keypoints=3", "cross_attention.kind=dense"),
        ("sam-detr-r50", "encoder.levels=2", "encoder.kind=dense"),
        ("sam-detr-r50", "encoder.points=2", "encoder.kind=dense"),
        ("tiny", "encoder.neck_norm=false", "encoder.kind=deformable"),
        ("deformable-detr-r50", "queries.position=boxes", "queries.kind=learned"),
        ("dab-detr-r50", "queries.position=queries", "queries.kind=anchors"),
        ("conditional-detr-r50", "queries.patterns=3", "queries.kind=learned"),
    ],
)
def test_what_a_kind_does_not_read_cannot_be_written(name: str, override: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"{kind} has no"):
        find_recipe(name).override(f"detector.{override}")


def test_unknown_choices_of_the_aligner_name_the_known() -> None:
    with pytest.raises(UserError, match=r"points.*avg.*max"):
        find_recipe("sam-detr-r50").override("detector.cross_attention.resample=mean")
    with pytest.raises(UserError, match="Did you mean keypoints"):
        find_recipe("sam-detr-r50").override("detector.cross_attention.keypoint=2")
