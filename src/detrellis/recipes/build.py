"""From a recipe to modules. The detector comes first and from the seed alone: no scheme can change its weights."""

from __future__ import annotations

import zlib

import torch
from torch import nn

from detrellis.detector import Detector
from detrellis.errors import UserError
from detrellis.matching import Hungarian, MatchingCost
from detrellis.nn.attention import SelfAttention
from detrellis.nn.backbone import Norm, ResNet, TimmBackbone
from detrellis.nn.decoder import AnchorPosition, Decoder, DecoderLayer
from detrellis.nn.deformable import DeformableAttention
from detrellis.nn.encoder import DeformableEncoder, DeformableEncoderLayer
from detrellis.nn.heads import Heads
from detrellis.nn.neck import MultiScaleNeck
from detrellis.nn.position import SineMap
from detrellis.nn.proposals import ProposalHead
from detrellis.nn.queries import LearnedQueries, ProposalQueries
from detrellis.recipes.config import BackboneConfig, DetectorConfig, LossConfig, Recipe
from detrellis.schemes.base import TrainingScheme
from detrellis.schemes.denoising import ContrastiveDenoising
from detrellis.supervision import Supervision
from detrellis.training import TrainableDetector

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


def build_backbone(config: BackboneConfig) -> ResNet | TimmBackbone:
    """The backbone, with pretrained weights where the recipe asks for them."""
    norm: Norm = config.normalisation
    try:
        if config.name in RESNETS:
            return ResNet(
                config.name, config.strides, pretrained=config.pretrained, norm=norm, dilation=config.dilation
            )
        if config.dilation:
            raise UserError(f"backbone {config.name}: dilation (DC5) exists for {', '.join(RESNETS)} only")
        return TimmBackbone(config.name, config.strides, pretrained=config.pretrained, norm=norm)
    except OSError as error:  # what torch.hub and the timm hub raise when they cannot reach their hosts
        raise UserError(
            f"the pretrained weights of {config.name} cannot be reached ({error})",
            "Connect once so that they are cached, or train from scratch with -o detector.backbone.pretrained=false.",
        ) from None
    except NotImplementedError:
        raise UserError(f"backbone {config.name} cannot be dilated", "DC5 needs resnet50 or resnet101.") from None


def build_queries(config: DetectorConfig, classes: int) -> nn.Module:
    """The module that yields the main queries."""
    if config.queries == "learned":
        return LearnedQueries(config.width, config.query_count)
    rank_by = "first" if config.proposal_targets == "objectness" else "max"
    head = ProposalHead(config.width, classes, config.query_count, rank_by=rank_by)  # type: ignore[arg-type]
    return ProposalQueries(
        head,
        config.width,
        learned_content=config.queries == "mixed",
        derive_position=config.query_position == "queries",
    )


def _refuse(config: DetectorConfig) -> None:
    """Combinations of network parts that do not exist, each with what to use instead."""
    maps, boxes = len(config.backbone.strides), config.query_position == "boxes"
    problems = {
        "queries=learned and query_position=boxes do not combine: learned queries are points. Take queries=mixed": (
            boxes and config.queries == "learned"
        ),
        "queries=proposals and query_position=boxes do not combine: which gives the content? Take queries=mixed": (
            boxes and config.queries == "proposals"
        ),
        f"{maps} backbone maps need levels={maps} or more": config.levels < maps,
        f"width={config.width} is not a multiple of heads={config.heads} and of 32": (
            config.width % config.heads or config.width % 32
        ),
    }
    for problem, holds in problems.items():
        if holds:
            raise UserError(f"detector: {problem}", "Set the parts with -o detector.NAME=VALUE.")


def build_detector(config: DetectorConfig, classes: int) -> Detector:
    """A detector for `classes` classes, initialised from the global random state."""
    _refuse(config)
    width, dropout = config.width, config.dropout

    def attention() -> DeformableAttention:
        return DeformableAttention(width, config.heads, config.levels, config.points)

    backbone = build_backbone(config.backbone)
    position = SineMap(width, temperature=config.position_temperature, offset=config.position_offset)
    neck = MultiScaleNeck(backbone.channels, width, config.levels, position)
    encoder = DeformableEncoder(
        [
            DeformableEncoderLayer(attention(), width, config.hidden, dropout=dropout)
            for _ in range(config.encoder_layers)
        ]
    )
    layers = [
        DecoderLayer(
            SelfAttention(width, config.heads, dropout=dropout), attention(), width, config.hidden, dropout=dropout
        )
        for _ in range(config.decoder_layers)
    ]
    # References that start as points need small boxes; proposals bring their size.
    size_bias = -2.0 if config.queries == "learned" else 0.0
    shared = config.shared_heads or config.refine == "none"
    decoder = Decoder(
        layers,
        Heads(width, classes, len(layers), shared=shared, size_bias=size_bias),
        refine=config.refine,
        position=AnchorPosition(width) if config.query_position == "boxes" else None,
        final_norm=config.final_norm,
        width=width,
        eps=config.eps,
    )
    return Detector(backbone, neck, encoder, build_queries(config, classes), decoder, top_k=config.top_k)


def capabilities(config: DetectorConfig) -> frozenset[str]:
    """What schemes may ask of a detector."""
    found = {"sigmoid_scores", "several_levels"} if config.levels > 1 else {"sigmoid_scores"}
    if config.query_position == "boxes":
        found.add("box_queries")
    if config.queries != "learned":
        found.add("proposals")
    return frozenset(found)


REMEDIES = {"box_queries": "take a detector whose queries are boxes, such as tiny or dino-r50"}


def build_schemes(recipe: Recipe, classes: int, seed: int) -> list[TrainingScheme]:
    """The recipe's training schemes, each initialised from a seed of its own."""
    config, schemes = recipe.detector, recipe.schemes
    built: list[TrainingScheme] = []
    with torch.random.fork_rng(devices=[]):
        if schemes.cdn is not None:
            torch.manual_seed(_seed(seed, "cdn"))
            options = schemes.cdn.model_dump()
            built.append(ContrastiveDenoising(config.width, classes, config.eps, **options))
    able = capabilities(config)
    for scheme in built:
        for missing in sorted(scheme.requires - able):
            raise UserError(
                f"scheme {scheme.name} cannot train {recipe.name}: the detector has no {missing.replace('_', ' ')}",
                f"Leave the scheme out, or {REMEDIES.get(missing, 'take another recipe')}.",
            )
    return built


def build_supervision(config: LossConfig) -> Supervision:
    """One-to-one matching with the set loss, weighted as the recipe says."""
    cost = MatchingCost(classes=config.cost_classes, l1=config.cost_box, giou=config.cost_giou)
    weights = {"class": config.classes, "box": config.box, "giou": config.giou}
    return Supervision(assign=Hungarian(cost), weights=weights)


def build(recipe: Recipe, classes: int, *, seed: int = 0) -> TrainableDetector:
    """Detector and schemes for training; the detector's weights depend on the recipe's network part and seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, "detector"))
        detector = build_detector(recipe.detector, classes)
    return TrainableDetector(
        detector,
        build_schemes(recipe, classes, seed),
        build_supervision(recipe.loss),
        proposal_targets=recipe.detector.proposal_targets,
    )


def _seed(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())
