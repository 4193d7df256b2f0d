"""From a recipe to what is trained.
The detector comes first, from the seed alone: no scheme can change its weights.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from detrellis.detector import Detector
from detrellis.errors import UserError
from detrellis.mask_points import MaskCost, Points
from detrellis.matching import Candidates, Hungarian, MatchingCost, focal_term, softmax_term
from detrellis.nn.accelerate import accelerate
from detrellis.nn.recompute import recompute_layers
from detrellis.nn.undrawn import Undrawn
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.network import build_detector, build_feed_forward
from detrellis.recipes.refuse import MISSING, refuse
from detrellis.schemes.align import Align
from detrellis.schemes.base import TrainingScheme
from detrellis.schemes.cdn import ContrastiveDenoising
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.schemes.config import (
    AlignConfig,
    CDNConfig,
    CoConfig,
    DACConfig,
    DenseConfig,
    DNConfig,
    FederatedConfig,
    GroupConfig,
    HybridConfig,
    MSConfig,
    RankConfig,
    SchemeConfig,
    SQRConfig,
    StableConfig,
)
from detrellis.schemes.dac import DAC
from detrellis.schemes.dense import Dense
from detrellis.schemes.dn import Denoising
from detrellis.schemes.federated import Federated
from detrellis.schemes.group import Group
from detrellis.schemes.hybrid import Hybrid
from detrellis.schemes.ms import MS
from detrellis.schemes.rank import Rank
from detrellis.schemes.sqr import SQR
from detrellis.schemes.stable import Stable
from detrellis.set_loss import (
    CLASSIFICATION,
    IOU_ERRORS,
    LossRule,
    softmax_class_loss,
    softmax_set_loss,
)
from detrellis.supervision import Supervision
from detrellis.training import TrainableDetector


def build_schemes(
    recipe: Recipe, detector: Detector, classes: int, seed: int
) -> list[TrainingScheme]:
    """The recipe's training schemes, each initialised from a seed of its own."""
    built: list[TrainingScheme] = []
    with torch.random.fork_rng(devices=[]):
        for name, config in recipe.schemes:
            if config is not None:
                torch.manual_seed(_seed(seed, name))
                scheme = build_scheme(config, recipe.detector, detector, classes)
                scheme.until = config.until
                built.append(scheme)
    accelerate(*built)
    for scheme in built:
        for missing in sorted(scheme.requires - recipe.detector.capabilities):
            reason, remedy = MISSING[missing]
            raise UserError(
                f"scheme {scheme.name} cannot train {recipe.name}: {reason}",
                f"Leave it out, or {remedy}.",
            )
    return built


def build_scheme(
    config: SchemeConfig, network: DetectorConfig, detector: Detector, classes: int
) -> TrainingScheme:
    """A scheme from its config, and from what it needs to know of the detector."""
    match config:
        case FederatedConfig():
            return Federated(config, classes)
        case DNConfig():
            return Denoising(config, network.width, classes, network.eps)
        case CDNConfig():
            return ContrastiveDenoising(config, network.width, classes, network.eps)
        case HybridConfig():
            return Hybrid(config, detector.queries)
        case DenseConfig():
            return Dense(config, detector)
        case CoConfig():
            positioned, layers = network.queries.position == "queries", network.decoder.layers
            strides = network.level_strides
            return Collaborative(
                config, network.width, classes, strides, layers=layers, positioned=positioned
            )
        case AlignConfig():
            return Align(config)
        case StableConfig():
            return Stable(config)
        case RankConfig():
            return Rank(config)
        case DACConfig():
            return DAC(config, detector.queries)
        case MSConfig():
            make = partial(build_feed_forward, network, network.width, network.decoder.hidden)
            return MS(config, network.decoder.layers, make)
        case SQRConfig():
            return SQR(config)
        case GroupConfig():
            return Group(config, detector.queries)


def build_supervision(recipe: Recipe) -> Supervision:
    """One-to-one matching with the set loss, weighted as the recipe says."""
    config, detector = recipe.loss, recipe.detector
    softmax = detector.scores == "softmax"
    term = softmax_term if softmax else focal_term
    cost = MatchingCost(config.cost_classes, config.cost_box, config.cost_giou, term)
    terms = ("box", "giou", "iou_branch", "mask", "dice", "fgl", "ddf", "salience")
    names = {"class": "classes", **{name: name for name in terms}}
    k = config.one_to_many
    # As if copies were targets
    weights = {term: getattr(config, name) / k for term, name in names.items()}
    candidates = Candidates(k, k, k, positive_fraction=None)
    match_masks = detector.masks is not None and (config.cost_mask > 0 or config.cost_dice > 0)
    masks = MaskCost(config.cost_mask, config.cost_dice) if match_masks else None
    cross_entropy = softmax_set_loss if detector.boxes else softmax_class_loss
    rule: LossRule = partial(cross_entropy, no_object=config.no_object)
    if not softmax:
        rule = replace(
            CLASSIFICATION[config.classification], iou_error=IOU_ERRORS[config.iou_error]
        )
    return Supervision(Hungarian(cost, candidates, masks=masks, union=config.union), rule, weights)


def build_points(recipe: Recipe) -> Points | None:
    """Where masks are compared; None where none are learned."""
    if recipe.detector.masks is None:
        return None
    return Points(recipe.loss.points, inside=recipe.loss.points_in == "image")


def build(
    recipe: Recipe, classes: int, *, seed: int = 0, stored: bool = False
) -> TrainableDetector:
    """Detector and schemes for training;
    the detector's weights depend on the recipe's network part and seed only.

    Raises `UserError` for a recipe whose parts contradict each other or name what is not there.
    `stored`: of a run that exists, which goes on although it has a factor on learning rates that
    belongs to no parameter.
    """
    refuse(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, "detector"))
        detector = build_detector(recipe.detector, classes)
    encoder = recipe.detector.encoder
    model = TrainableDetector(
        detector,
        build_schemes(recipe, detector, classes, seed),
        build_supervision(recipe),
        proposal_targets="objectness" if recipe.detector.objectness else "classes",
        token_targets=encoder.targets if encoder.kind == "salience" else "salience",
        points=build_points(recipe),
    )
    if recipe.optim.checkpointing:
        recompute_layers(detector.encoder, detector.decoder)
    if not stored:
        _refuse_idle_factors(recipe.optim.scaled, [name for name, _ in model.named_parameters()])
    return model


def build_untrained(recipe: Recipe, classes: int) -> Detector:
    """The detector alone, to be filled with trained weights:
    its own are no start for training, and no generator of random numbers moves.
    """
    with torch.random.fork_rng(devices=[]), Undrawn():
        return build_detector(recipe.untrained().detector, classes)


def _refuse_idle_factors(scaled: Mapping[str, float], names: Sequence[str]) -> None:
    """`UserError` for a factor on learning rates that belongs to no parameter."""
    for key in scaled:
        if not any(key in name for name in names):
            parts = sorted(
                {part for name in names for part in name.split(".")[1:-1] if not part.isdecimal()}
            )
            near = difflib.get_close_matches(key, parts, n=3, cutoff=0.5) or [
                "backbone",
                "encoder",
                "decoder",
            ]
            raise UserError(
                f"optim.scaled.{key}={scaled[key]:g}: no parameter's name contains {key!r}",
                f"Names contain, for example: {', '.join(near)}. Without it: -o "
                f"'optim.scaled={_flow(scaled, key)}'.",
            )


def _flow(scaled: Mapping[str, float], left_out: str) -> str:
    """The other factors as YAML."""
    return (
        "{"
        + ", ".join(f"{key}: {factor:g}" for key, factor in scaled.items() if key != left_out)
        + "}"
    )


def _seed(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())
