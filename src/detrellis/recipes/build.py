"""From a recipe to what is trained. The detector comes first, from the seed alone: no scheme can change its weights."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from detrellis.detector import Detector
from detrellis.errors import UserError
from detrellis.matching import Candidates, Hungarian, MatchingCost, focal_term, softmax_term
from detrellis.nn.accelerate import accelerate
from detrellis.recipes.branches import build_branches
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.network import build_detector
from detrellis.recipes.refuse import MISSING, refuse
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


def build_schemes(recipe: Recipe, detector: Detector, classes: int, seed: int) -> list[TrainingScheme]:
    """The recipe's training schemes, each initialised from a seed of its own."""
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
    accelerate(*built)
    for scheme in built:
        for missing in sorted(scheme.requires - recipe.detector.capabilities):
            reason, remedy = MISSING[missing]
            raise UserError(f"scheme {scheme.name} cannot train {recipe.name}: {reason}", f"Leave it out, or {remedy}.")
    return built


def _hybrid(config: DetectorConfig, detector: Detector, queries: int | None = None, **dials: Any) -> Hybrid:
    """H-DETR with the paper\'s proportion where no number is given: 1500 extra queries beside 300."""
    return Hybrid(detector.queries, queries=queries or min(5 * config.queries.count, 1500), **dials)


def _group(config: DetectorConfig, detector: Detector, k: int | None = None, **dials: Any) -> Group:
    """Group DETR with the paper\'s number of groups where none is given: 11, and 3 of the larger ones of DINO."""
    return Group(detector.queries, config.queries.count, k=k or (3 if config.two_stage else 11), **dials)


def _co(recipe: Recipe, classes: int, **dials: Any) -> Collaborative:
    """Co-DETR with branches in proportion to the detector\'s width, and queries of the detector\'s kind."""
    config = recipe.detector
    positioned = config.queries.position == "queries"
    features = positioned if dials["features"] is None else dials["features"]
    chosen = {"features": features, "positioned": positioned, "layers": config.decoder.layers}
    adapter, branches = build_branches(config, classes, dials.pop("branches"), dials.pop("convolutions"))
    return Collaborative(config.width, adapter, branches, **dials | chosen)


def build_supervision(recipe: Recipe) -> Supervision:
    """One-to-one matching with the set loss, weighted as the recipe says."""
    config, softmax = recipe.loss, recipe.detector.scores == "softmax"
    term = softmax_term if softmax else focal_term
    cost = MatchingCost(config.cost_classes, config.cost_box, config.cost_giou, term)
    weights = {"class": config.classes, "box": config.box, "giou": config.giou, "iou_branch": config.iou_branch}
    k = config.one_to_many
    weights = {name: weight / k for name, weight in weights.items()}  # as if copies were targets
    candidates = Candidates(k, k, k, positive_fraction=None)
    cross_entropy = partial(softmax_set_loss, no_object=config.no_object)
    return Supervision(
        Hungarian(cost, candidates), cross_entropy if softmax else CLASSIFICATION[config.classification], weights
    )


def build(recipe: Recipe, classes: int, *, seed: int = 0, stored: bool = False) -> TrainableDetector:
    """Detector and schemes for training; the detector's weights depend on the recipe's network part and seed only.

    Raises `UserError` for a recipe whose parts contradict each other or name what is not there. `stored`: of a run that
    exists, which goes on although it has a factor on learning rates that belongs to no parameter.
    """
    refuse(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, "detector"))
        detector = build_detector(recipe.detector, classes)
    model = TrainableDetector(
        detector,
        build_schemes(recipe, detector, classes, seed),
        build_supervision(recipe),
        proposal_targets="objectness" if recipe.detector.objectness else "classes",
    )
    if not stored:
        _refuse_idle_factors(recipe.optim.scaled, [name for name, _ in model.named_parameters()])
    return model


def build_untrained(recipe: Recipe, classes: int) -> Detector:
    """The detector alone, to be filled with trained weights; no generator of random numbers moves."""
    with torch.random.fork_rng(devices=[]):
        return build_detector(recipe.untrained().detector, classes)


def _refuse_idle_factors(scaled: Mapping[str, float], names: Sequence[str]) -> None:
    """`UserError` for a factor on learning rates that belongs to no parameter."""
    for key in scaled:
        if not any(key in name for name in names):
            parts = sorted({part for name in names for part in name.split(".")[1:-1] if not part.isdecimal()})
            near = difflib.get_close_matches(key, parts, n=3, cutoff=0.5) or ["backbone", "encoder", "decoder"]
            raise UserError(
                f"optim.scaled.{key}={scaled[key]:g}: no parameter's name contains {key!r}",
                f"Names contain, for example: {', '.join(near)}. Without it: -o 'optim.scaled={_flow(scaled, key)}'.",
            )


def _flow(scaled: Mapping[str, float], left_out: str) -> str:
    """The other factors as YAML."""
    return "{" + ", ".join(f"{key}: {factor:g}" for key, factor in scaled.items() if key != left_out) + "}"


def _seed(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())
