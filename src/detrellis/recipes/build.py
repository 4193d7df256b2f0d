"""From a recipe to what is trained. The detector comes first, from the seed alone: no scheme can change its weights."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from detrellis.detector import Detector
from detrellis.errors import Advice, UserError
from detrellis.matching import Candidates, Hungarian, MatchingCost, focal_term, softmax_term
from detrellis.recipes.branches import build_branches
from detrellis.recipes.config import DetectorConfig, Recipe
from detrellis.recipes.network import build_detector, capabilities
from detrellis.schemes.align import Align
from detrellis.schemes.base import TrainingScheme
from detrellis.schemes.cdn import ContrastiveDenoising
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.schemes.dn import Denoising
from detrellis.schemes.group import Group
from detrellis.schemes.hybrid import Hybrid
from detrellis.schemes.stable import Stable
from detrellis.supervision import CLASSIFICATION, Supervision, softmax_set_loss
from detrellis.training import TrainableDetector

# What a detector without the capability lacks, and what to use instead.
MISSING = {
    "box_queries": (
        "its queries are not boxes, and a disturbed box cannot be one of them",
        "take a detector whose queries are, such as tiny, dab-detr-r50 or dino-r50",
    ),
    "sigmoid_scores": (
        "its classes exclude each other (softmax)",
        "take a detector with sigmoid scores, such as conditional-detr-r50",
    ),
}


def build_schemes(recipe: Recipe, detector: Detector, classes: int, seed: int) -> list[TrainingScheme]:
    """The recipe's training schemes, each initialised from a seed of its own."""
    _refuse(recipe)
    network = (recipe.detector.width, classes, recipe.detector.eps)
    makers: dict[str, Callable[..., TrainingScheme]] = {
        "dn": partial(Denoising, *network),
        "cdn": partial(ContrastiveDenoising, *network),
        "hybrid": partial(_hybrid, recipe.detector, detector),
        "co": partial(_co, recipe, classes),
        "align": Align,
        "stable": Stable,
        "group": partial(_group, recipe.detector, detector),
    }
    chosen = {name: config for name, config in recipe.schemes if config is not None}
    built: list[TrainingScheme] = []
    with torch.random.fork_rng(devices=[]):
        for name, config in chosen.items():
            torch.manual_seed(_seed(seed, name))
            built.append(makers[name](**config.model_dump()))
    able = capabilities(recipe.detector)
    for scheme in built:
        for missing in sorted(scheme.requires - able):
            reason, remedy = MISSING[missing]
            raise UserError(f"scheme {scheme.name} cannot train {recipe.name}: {reason}", f"Leave it out, or {remedy}.")
    return built


def _hybrid(config: DetectorConfig, detector: Detector, queries: int | None = None, **dials: Any) -> Hybrid:
    """The paper has 1500 beside 300."""
    return Hybrid(detector.queries, queries=queries or min(5 * config.query_count, 1500), **dials)


def _group(config: DetectorConfig, detector: Detector, k: int | None = None, **dials: Any) -> Group:
    """The paper has 11 groups, and 3 of DINO's larger ones."""
    if config.patterns:
        raise UserError("scheme group and patterns do not combine", "Take -o detector.patterns=0.")
    two_stage = config.queries in ("proposals", "mixed")
    return Group(detector.queries, config.query_count, k=k or (3 if two_stage else 11), **dials)


def _co(recipe: Recipe, classes: int, **dials: Any) -> Collaborative:
    """Branches in proportion to the detector's width; queries of the detector's kind."""
    config = recipe.detector
    positioned = config.query_position == "queries"
    features = positioned if dials["features"] is None else dials["features"]
    chosen = {"features": features, "positioned": positioned, "layers": config.decoder_layers}
    adapter, branches = build_branches(config, classes, dials.pop("branches"), dials.pop("convolutions"))
    return Collaborative(config.width, adapter, branches, **dials | chosen)


def _refuse(recipe: Recipe) -> None:
    """Two parts of a recipe that both say what a positive's class should learn."""
    align, stable, loss = recipe.schemes.align, recipe.schemes.stable, recipe.loss.classification
    aims = align is not None and align.classification != "base"
    supervised = stable is not None and stable.supervised
    if aims and supervised:
        raise UserError(
            "schemes align and stable both set the classification target",
            "Keep one: -o schemes.align.classification=base, or -o schemes.stable.supervised=false.",
        )
    if recipe.schemes.group is not None and recipe.schemes.hybrid is not None:
        warnings.warn(Advice("schemes group and hybrid do the same work twice: one of them will do"), stacklevel=2)
    if (aims and loss != "focal") or (supervised and loss not in ("focal", "psl")):
        one, remedy = (
            ("align", "-o schemes.align.classification=base")
            if aims
            else ("stable", "-o schemes.stable.supervised=false")
        )
        raise UserError(
            f"loss.classification={loss} and scheme {one} both set the classification target",
            f"Leave one out, or {remedy}.",
        )
    if loss != "focal" and recipe.detector.scores == "softmax":
        reason, remedy = MISSING["sigmoid_scores"]
        raise UserError(f"loss.classification={loss} cannot train {recipe.name}: {reason}", f"Or {remedy}.")


def build_supervision(recipe: Recipe) -> Supervision:
    """One-to-one matching with the set loss, weighted as the recipe says."""
    config, softmax = recipe.loss, recipe.detector.scores == "softmax"
    term = softmax_term if softmax else focal_term
    cost = MatchingCost(config.cost_classes, config.cost_box, config.cost_giou, term)
    weights = {"class": config.classes, "box": config.box, "giou": config.giou, "iou_branch": config.iou_branch}
    k = config.one_to_many
    weights = {name: weight / k for name, weight in weights.items()}  # as if copies were targets
    several = Candidates(k, k, k, share=None)
    softly = partial(softmax_set_loss, no_object=config.no_object)
    return Supervision(Hungarian(cost, several), softly if softmax else CLASSIFICATION[config.classification], weights)


def build(recipe: Recipe, classes: int, *, seed: int = 0) -> TrainableDetector:
    """Detector and schemes for training; the detector's weights depend on the recipe's network part and seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, "detector"))
        detector = build_detector(recipe.detector, classes)
    return TrainableDetector(
        detector,
        build_schemes(recipe, detector, classes, seed),
        build_supervision(recipe),
        proposal_targets=recipe.detector.proposal_targets,
    )


def _seed(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())
