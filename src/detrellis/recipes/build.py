"""From a recipe to what is trained. The detector comes first, from the seed alone: no scheme can change its weights."""

from __future__ import annotations

import zlib
from functools import partial

import torch

from detrellis.errors import UserError
from detrellis.matching import Hungarian, MatchingCost, focal_term, softmax_term
from detrellis.recipes.config import Recipe
from detrellis.recipes.network import build_detector, capabilities
from detrellis.schemes.base import TrainingScheme
from detrellis.schemes.cdn import ContrastiveDenoising
from detrellis.schemes.dn import Denoising
from detrellis.supervision import Supervision, focal_set_loss, softmax_set_loss
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


def build_schemes(recipe: Recipe, classes: int, seed: int) -> list[TrainingScheme]:
    """The recipe's training schemes, each initialised from a seed of its own."""
    config, schemes = recipe.detector, recipe.schemes
    built: list[TrainingScheme] = []
    with torch.random.fork_rng(devices=[]):
        if schemes.dn is not None:
            torch.manual_seed(_seed(seed, "dn"))
            built.append(Denoising(config.width, classes, config.eps, **schemes.dn.model_dump()))
        if schemes.cdn is not None:
            torch.manual_seed(_seed(seed, "cdn"))
            built.append(ContrastiveDenoising(config.width, classes, config.eps, **schemes.cdn.model_dump()))
    able = capabilities(config)
    for scheme in built:
        for missing in sorted(scheme.requires - able):
            reason, remedy = MISSING[missing]
            raise UserError(f"scheme {scheme.name} cannot train {recipe.name}: {reason}", f"Leave it out, or {remedy}.")
    return built


def build_supervision(recipe: Recipe) -> Supervision:
    """One-to-one matching with the set loss, weighted as the recipe says."""
    config, softmax = recipe.loss, recipe.detector.scores == "softmax"
    term = softmax_term if softmax else focal_term
    cost = MatchingCost(config.cost_classes, config.cost_box, config.cost_giou, term)
    weights = {"class": config.classes, "box": config.box, "giou": config.giou}
    rule = partial(softmax_set_loss, no_object=config.no_object) if softmax else focal_set_loss
    return Supervision(Hungarian(cost), rule, weights)


def build(recipe: Recipe, classes: int, *, seed: int = 0) -> TrainableDetector:
    """Detector and schemes for training; the detector's weights depend on the recipe's network part and seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, "detector"))
        detector = build_detector(recipe.detector, classes)
    return TrainableDetector(
        detector,
        build_schemes(recipe, classes, seed),
        build_supervision(recipe),
        proposal_targets=recipe.detector.proposal_targets,
    )


def _seed(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())
