"""Every kind of network with every scheme and class loss:
it builds, or the refusal names both sides and what helps.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product

import pytest
import torch

from detrellis.errors import UserError
from detrellis.recipes import choose_recipe, network
from detrellis.recipes.build import build
from detrellis.recipes.config import Recipe
from detrellis.schemes.config import SchemesConfig

from ..small import CLASSES, shrink, small

NETWORKS = (
    "tiny",
    "detr_r50",
    "conditional_detr_r50",
    "deformable_detr_r50_two_stage",
    "sam_detr_r50",
)
POINTS = ("conditional_detr_r50", "deformable_detr_r50_two_stage", "detr_r50")
SOFTMAX = ("detr_r50",)
BOXES_ONLY = ("dn", "cdn")
SIGMOID_ONLY = ("co", "align", "stable", "rank", "federated", "dac", "ms", "sqr")
TWO_STAGE = ("tiny", "deformable_detr_r50_two_stage")  # dense queries need proposals
SETTERS = ("align", "stable", "rank")  # of what a positive's class should learn


def refused(recipe: Recipe) -> str | None:
    try:
        with torch.device("meta"):
            build(recipe, CLASSES)
    except UserError as error:
        return f"{error.message} {error.remedy}"
    return None


@pytest.mark.parametrize("name", NETWORKS)
def test_schemes_and_losses_that_cannot_be_are_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "build_backbone", cache(network.build_backbone))
    plain = small(name, ["none"])
    for scheme, loss in product(("none", *SchemesConfig.model_fields), ("focal", "qfl")):
        said = refused(plain.with_schemes(scheme).override(f"loss.classification={loss}"))
        unfit = (scheme in BOXES_ONLY and name in POINTS) or (
            scheme in SIGMOID_ONLY and name in SOFTMAX
        )
        unfit |= scheme == "dense" and name not in TWO_STAGE
        unfit |= scheme == "ms"  # their layers have self-attention first
        # Its layers hand on which queries are distinct
        unfit |= scheme == "sqr" and name == "tiny"
        lossy = loss != "focal" and (name in SOFTMAX or scheme in SETTERS)
        assert (said is not None) == (unfit or lossy), (scheme, loss, said)
        assert said is None or re.search(r"-o |Leave ", said)
        assert (
            said is None
            or (f"scheme {scheme}" if unfit and not lossy else f"loss.classification={loss}")
            in said
        )
    said = refused(plain.override("detector.iou_branch=root"))
    assert (said is not None) == (name in SOFTMAX)
    assert said is None or "scores=softmax and iou_branch=root" in said


@pytest.mark.parametrize(
    ("scheme", "dials", "loss"),
    [
        ("cdn", [], "vfl"),
        ("stable", [], "focal"),
        ("stable", ["schemes.stable.supervised=false"], "vfl"),
        ("align", ["schemes.align.classification=base"], "vfl"),
        ("align", ["schemes.align.classification=base", "loss.classification=mal"], "mal"),
    ],
)
def test_a_scheme_takes_the_place_of_the_loss_where_it_sets_the_target(
    scheme: str, dials: list[str], loss: str
) -> None:
    chosen = choose_recipe("small", scheme=scheme, override=dials)
    assert (chosen.loss.classification, refused(shrink(chosen))) == (loss, None)


def test_a_loss_and_a_scheme_that_both_set_the_target_are_refused() -> None:
    chosen = choose_recipe("small", scheme="stable", override="loss.classification=vfl")
    said = refused(shrink(chosen))
    assert said is not None
    assert "loss.classification=vfl and scheme stable both set" in said


def test_a_warmup_is_a_fraction_or_steps() -> None:
    said = refused(small("tiny").override("schedule.warmup_steps=100"))
    assert said is not None
    assert "warmup=0.03 and warmup_steps=100" in said
    assert (
        refused(small("tiny").override(["schedule.warmup_steps=100", "schedule.warmup=0"])) is None
    )


def test_a_flat_part_belongs_to_a_cosine() -> None:
    assert refused(small("tiny").override("schedule.flat=0.5")) is None
    said = refused(small("tiny").override(["schedule.flat=0.5", "schedule.shape=step"]))
    assert said is not None
    assert "schedule.flat=0.5" in said
    # The remedy works: `small` has a flat part of its own, which a step has to switch off.
    assert "schedule.flat=0," in said
    assert refused(small("small").override("schedule.shape=step")) is not None
    assert refused(small("small").override(["schedule.shape=step", "schedule.flat=0"])) is None


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("tiny", "optim.fully_shard=true"),
        ("tiny", "optim.checkpointing=true"),
        ("sam_detr_r50", "optim.compile=true"),
    ],
)
def test_what_cannot_be_compiled_is_named(name: str, other: str) -> None:
    compiled = small(name).override([other, "optim.compile=true"])
    said = refused(compiled)
    assert said is not None
    assert "optim.compile and" in said
    assert refused(compiled.override("optim.compile=false")) is None
