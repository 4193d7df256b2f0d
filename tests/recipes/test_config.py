"""Recipes: every name is found or suggested, every override is checked."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from detrellis.errors import UserError
from detrellis.recipes import RECIPES, Recipe, find_recipe, tiny_sized
from detrellis.recipes.build import build
from detrellis.recipes.detector import AnchorQueriesConfig, MixedQueriesConfig
from detrellis.schemes.config import CoConfig


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_found_by_name_and_survive_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert find_recipe(name) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.about


@pytest.mark.parametrize("name", ["DINO-R50", "dino_r50", " Dino-r50"])
def test_a_recipe_is_found_as_people_write_it(name: str) -> None:
    assert find_recipe(name).name == "dino-r50"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dino-r5", "Did you mean dino-r50 or dino-r50-5scale"),
        ("dino", "Did you mean dino-r50 or dino-r50-5scale or dino-r50-lsj"),
        ("sam_detr", "Did you mean sam-detr-r50 or"),
        ("dion-r50", "Did you mean dino-r50"),
        ("yolov8", "detrellis recipes lists them"),
        ("", "detrellis recipes lists them"),
    ],
)
def test_another_recipe_is_answered_with_those_of_its_kind(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_recipe(name)


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr=0.001", "optim.lr", 1e-3),
        ("data.size=[192, 256]", "data.size", (192, 256)),
        ("data.size=640", "data.size", 640),
        ("schemes.cdn=null", "schemes.cdn", None),
        ("schemes.cdn.number=50", "schemes.cdn.number", 50),
        ("detector.backbone.name=resnet34", "detector.backbone.name", "resnet34"),
        ("optim.scaled.backbone=0.5", "optim.scaled", {"backbone": 0.5}),
        ("optim.scaled={neck: 2}", "optim.scaled", {"neck": 2.0}),
        ("optim.amp=false", "optim.amp", False),
        ("schedule.drops=[8e-1, 9e-1]", "schedule.drops", (0.8, 0.9)),
        ("optim.batch_size=010", "optim.batch_size", 10),
        ("name=no", "name", "no"),
        ("schemes.cdn=false", "schemes.cdn", None),
    ],
)
def test_override(text: str, path: str, value: object) -> None:
    found: object = find_recipe("dino-r50").override([text])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lrr=1", "Did you mean lr?"),
        ("optm.lr=1", "Did you mean optim?"),
        ("optim.lr", "no value"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr.x=1", "lr has no parts"),
        ("data.augment=mosaic", "data.augment"),
        ("zzz=1", "Known: name"),
        ("optim.lr={", "not YAML"),
        ("optim.batch_size=0", "optim.batch_size=0 has to be at least 1 and at most 1"),
        ("optim.lr=-1", "optim.lr=-1 has to be above 0 and at most 1"),
        ("optim.ema=2", "optim.ema=2 has to be at least 0 and below 1"),
        ("detector.queries.count=0", "detector.queries.count=0 has to be at least 1"),
        ("schedule.epochs=0", "schedule.epochs=0 has to be at least 1"),
        ("optim.lr=.inf", "optim.lr=inf has to be a number above 0 and at most 1"),
        ("optim.weight_decay=.nan", "optim.weight_decay=nan has to be a number at least 0"),
        ("optim.lr=true", "optim.lr=True has to be a number above 0"),
        ("optim.amp=1", "optim.amp=1 has to be true or false"),
        ("optim.batch_size=8.0", "has to be a whole number at least 1"),
        ("optim.batch_size=1_0", "optim.batch_size='1_0' has to be a whole number"),
        ("schedule.epochs=" + "9" * 5000, "has to be a whole number"),
        ("schedule.drops=[2.0]", "schedule.drops.0=2.0 has to be above 0 and below 1"),
        ("schedule.drops=[0.9, 0.8]", "has to ascend"),
        (
            "data.size=[64]",
            "data.size=[64] has to be the short side, such as 640, or [height, width]",
        ),
        ("data.size=[1, 2, 3]", "the short side, such as 640, or [height, width]"),
        ("data.zoom=[0, 0]", "data.zoom.0=0 has to be above 0"),
        ("data.zoom=[1.25, 0.8]", "[lowest, highest]"),
        ("data.jitter=-1", "data.jitter=-1 has to be at least 0 and at most 1"),
        ("detector.backbone.strides=[]", "has to name at least one"),
        ("detector.backbone.strides=[16, 8]", "has to ascend"),
        ("detector.dropout=1", "detector.dropout=1 has to be at least 0 and below 1"),
        ("optim.scaled={backbone: -1}", "optim.scaled.backbone=-1 has to be at least 0"),
        ("optim.scaled.=1", "not empty"),
        ("loss.classification=focla", "did you mean focal?"),
        ("detector=3", "has to be a mapping of its parts"),
        ("name=7", "name=7 has to be text"),
    ],
)
def test_bad_overrides_name_the_remedy(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        find_recipe("tiny").override([text])
    assert message in str(error.value)


def test_a_kind_is_chosen_with_the_fields_of_that_kind() -> None:
    base = find_recipe("deformable-detr-r50").override("detector.queries.count=7")
    chosen = base.override(
        ["detector.queries.kind=anchors", "detector.queries.patterns=3"]
    ).detector.queries
    assert chosen == AnchorQueriesConfig(count=7, patterns=3)
    assert base.override(
        "detector.queries={kind: mixed, position: boxes}"
    ).detector.queries == MixedQueriesConfig(position="boxes")
    back = find_recipe("dn-detr-r50").override(
        ["detector.queries.kind=mixed", "detector.queries.kind=anchors"]
    )
    assert back.detector.queries == AnchorQueriesConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("detector.queries.patterns=3", "queries.kind=mixed has no 'patterns'"),
        (
            "detector.queries.patterns=3",
            "kind=anchors has it: before this, -o detector.queries.kind=anchors.",
        ),
        ("detector.queries.pattern=3", "Did you mean patterns?"),
        ("detector.queries.kind=anchor", "Did you mean anchors?"),
        ("detector.queries.kind=3", "Known: learned, anchors, proposals, mixed"),
        ("detector.queries=anchors", "Write -o detector.queries.kind=anchors."),
        ("detector.queries={count: 3}", "detector.queries.kind is missing"),
        (
            "detector.queries={kind: anchor}",
            "detector.queries.kind='anchor' has to be one of learned, anchors",
        ),
        (
            "detector.queries={kind: anchors, count: 0}",
            "detector.queries.count=0 has to be at least 1",
        ),
        (
            "detector.queries={kind: mixed, patterns: 2}",
            "there is no field detector.queries.patterns",
        ),
        ("detector.queries=3", "detector.queries=3 has to be a mapping of its parts"),
        ("detector.hidden=512", "Did you mean encoder.hidden or decoder.hidden?"),
        ("lr=1e-4", "Did you mean optim.lr?"),
    ],
)
def test_a_field_of_another_kind_or_part_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        find_recipe("tiny").override([text])
    assert message in str(error.value)


def test_schemes() -> None:
    plain = find_recipe("dino-r50").with_schemes(["none"])
    assert plain.schemes.cdn is None
    more = plain.with_schemes(["cdn=30"])
    assert more.schemes.cdn is not None
    assert more.schemes.cdn.number == 30
    assert plain.with_schemes("cdn=30") == more
    assert plain.override("optim.lr=1") == plain.override(["optim.lr=1"])
    assert (
        find_recipe("dino-r50").with_schemes(["none,cdn"]).schemes
        == find_recipe("dino-r50").schemes
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cnd", "Did you mean cdn?"),
        ("cdn=many", "'many' is not a whole number"),
        ("cdn=1.5", "Write --scheme cdn=N; N sets schemes.cdn.number"),
        ("cdn=0", "--scheme cdn=0: schemes.cdn.number=0 has to be at least 1"),
        ("align=-1", "schemes.align.k=-1 has to be at least 1"),
        ("group=0", "schemes.group.k=0 has to be at least 1"),
        ("dn=99999", "schemes.dn.groups=99999 has to be at least 1 and at most 100"),
        ("dn=" + "9" * 5000, "is not a whole number"),
        ("co=", "has to name at least one"),
        ("co=retina", "did you mean retinanet?"),
        ("co=atss,rcnn", "--scheme co=atss+rcnn"),
        ("none=3", "none takes no number"),
        ("stable=1", "stable takes no number"),
        ("", "no ''"),
    ],
)
def test_bad_schemes_name_the_remedy(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        find_recipe("dino-r50").with_schemes([text])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (
            "deformable-detr-r50",
            "detector.cross_attention.position_scale=true",
            "queries.kind=learned has its own",
        ),
        ("detr-r50", "detector.decoder.refine=detached", "-o detector.decoder.refine=none"),
        (
            "detr-r50",
            "detector.backbone.strides=[16, 32]",
            r"-o 'detector.backbone.strides=\[32\]'",
        ),
        ("detr-r50", "detector.queries.kind=proposals", "softmax"),
        ("sam-detr-r50", "detector.queries.kind=mixed", "-o detector.queries.kind=anchors"),
        ("tiny", "detector.encoder.levels=1", "-o detector.encoder.levels=2"),
        ("tiny", "detector.decoder.heads=7", "decoder.heads=7"),
        ("tiny", "detector.width=48", "32"),
        ("detr-r50", "detector.width=72", None),
        ("detr-r50", "detector.width=90", "decoder.heads=8"),
        ("detr-r50", "detector.encoder.heads=3", "encoder.heads=3"),
        ("co-dab-detr-r50", "detector.width=72", "scheme co and detector.width=72"),
        ("tiny", "detector.backbone.dilation=true", "stride 32"),
        ("tiny", "data.size=[8, 8]", "too small"),
        ("detr-r50", "data.size=16", "32 pixels"),
        ("detr-r50", "data.max_side=500", "the short side"),
        (
            "tiny",
            "optim.scaled.bakbone=0.5",
            "no parameter's name contains 'bakbone'\n.*for example: backbone",
        ),
        ("detr-r50", "loss.classification=qfl", "detector.scores=sigmoid"),
        ("detr-r50", "detector.iou_branch=root", "scores=softmax and iou_branch=root"),
    ],
)
def test_undefined_networks_are_refused_when_built(
    name: str, override: str, message: str | None
) -> None:
    recipe = find_recipe(name).untrained().override([override])
    with (
        nullcontext() if message is None else pytest.raises(UserError, match=message),
        torch.device("meta"),
    ):
        build(recipe, 3)


# Class weight, class cost, queries, dropout, FFN, top-k, epochs, eps, temperature and offset of the
# positions.
PUBLISHED = {
    "detr-r50": (1, 1, 100, 0.1, 2048, 100, 300, 1e-5, 10000, 0),
    "conditional-detr-r50": (2, 2, 300, 0.1, 2048, 100, 50, 1e-5, 10000, 0),
    "dab-detr-r50": (1, 2, 300, 0.0, 2048, 300, 50, 1e-3, 20, 0),
    "dn-detr-r50": (1, 2, 300, 0.0, 2048, 300, 50, 1e-3, 20, 0),
    "deformable-detr-r50": (2, 2, 300, 0.1, 1024, 100, 50, 1e-5, 10000, -0.5),
    "dab-deformable-detr-r50": (1, 2, 300, 0.0, 2048, 300, 50, 1e-3, 20, 0),
    "dn-deformable-detr-r50": (1, 2, 300, 0.0, 2048, 300, 50, 1e-3, 20, 0),
    "dino-r50": (1, 2, 900, 0.0, 2048, 300, 12, 1e-3, 20, 0),
    "deformable-detr-swin-l": (2, 2, 300, 0.0, 2048, 100, 12, 1e-5, 10000, -0.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_hold_the_published_settings(name: str) -> None:
    r = find_recipe(name)
    d = r.detector
    found = (
        r.loss.classes,
        r.loss.cost_classes,
        d.queries.count,
        d.dropout,
        d.decoder.hidden,
        d.top_k,
    )
    found += (r.schedule.epochs, d.eps, d.position_temperature, d.position_offset)
    assert found == PUBLISHED[name]
    assert (r.loss.box, r.loss.giou, r.optim.clip, r.optim.batch_size) == (5, 2, 0.1, 16)


def test_dilated_recipes_differ_in_the_dilation_only() -> None:
    for name in ("detr-r50", "conditional-detr-r50", "dab-detr-r50", "dn-detr-r50"):
        plain, dilated = find_recipe(name), find_recipe(f"{name}-dc5")
        again = dilated.override(["detector.backbone.dilation=false"])
        assert again.model_copy(update={"name": plain.name, "about": plain.about}) == plain


QUALITY = ("qfl", "ia_bce")  # whose negatives count in full


def test_any_recipe_can_be_made_tiny() -> None:
    for make in RECIPES.values():
        recipe = tiny_sized(make())
        with torch.device("meta"):
            model = build(recipe, 3)
        assert sum(p.numel() for p in model.detector.parameters()) < 8e6, recipe.name
        assert recipe.schemes == make().schemes
        dense = recipe.detector.encoder.kind == "dense"
        assert recipe.optim.lr == (1e-4 if dense else 1e-3), recipe.name
        assert recipe.schedule.flat == (0 if dense else 0.5), recipe.name
        other = recipe.detector.scores == "softmax" or recipe.loss.classification in QUALITY
        assert recipe.loss.classes == make().loss.classes if other else recipe.loss.classes >= 2
        weights = (recipe.loss.mask, recipe.loss.dice, recipe.loss.points)
        assert recipe.detector.masks is None or weights == (1.0, 1.0, 256), recipe.name
        assert recipe.detector.queries.boxes_from_masks is None, recipe.name


def test_a_scheme_of_names_takes_several() -> None:
    base = find_recipe("tiny")
    assert base.with_schemes("co").schemes.co is not None
    chosen = base.with_schemes("none,co=atss+atss + rcnn").schemes.co
    assert chosen is not None
    assert chosen.branches == ("atss", "atss", "rcnn")
    assert base.override("schemes.co.branches=[paa]").schemes.co == CoConfig(branches=("paa",))
    assert base.with_schemes("co=mask").needs_masks
    assert not base.with_schemes("co").needs_masks
    for text, named in (
        ("co=fastrcnn", r"co\.branches\.0='fastrcnn'"),
        ("co=", r"co\.branches=\[\]"),
        ("align=many", r"N sets schemes\.align\.k"),
    ):
        with pytest.raises(UserError, match=named):
            base.with_schemes(text)
    with pytest.raises(UserError, match=r"co\.branches"):
        base.override("schemes.co.branches=[]")


def test_a_scheme_may_last_for_a_part_of_the_run() -> None:
    base = find_recipe("small")
    chosen = base.with_schemes("co=atss@0.5,group=2@0.25,dense@1").schemes
    assert chosen.co is not None
    assert chosen.group is not None
    assert chosen.dense is not None
    assert (chosen.co.branches, chosen.co.until) == (("atss",), 0.5)
    assert (chosen.group.k, chosen.group.until) == (2, 0.25)
    assert chosen.dense.until == 1.0
    # What classes learn after it is the recipe's; a scheme to the end takes its place.
    assert base.with_schemes("align@0.5").loss == base.loss
    assert base.with_schemes("align").loss.classification == "focal"
    for text in ("align@half", "align@", "align@0", "align@2", "none@0.5"):
        with pytest.raises(UserError, match=f"--scheme {text}: ") as refusal:
            base.with_schemes(text)
        assert "@0.5" in refusal.value.remedy or text == "none@0.5", text
