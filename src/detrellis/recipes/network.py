"""From a `DetectorConfig` to the detector's modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from detrellis.detector import Detector
from detrellis.errors import UserError
from detrellis.nn.attention import DenseAttention, SelfAttention
from detrellis.nn.backbone import Norm, ResNet, TimmBackbone
from detrellis.nn.conditional import ConditionalCrossAttention, ConditionalSelfAttention
from detrellis.nn.decoder import Decoder, DecoderLayer
from detrellis.nn.deformable import DeformableAttention
from detrellis.nn.encoder import Encoder, EncoderLayer
from detrellis.nn.heads import Heads
from detrellis.nn.mlp import FeedForward
from detrellis.nn.neck import MultiScaleNeck, SingleScaleNeck
from detrellis.nn.position import SineMap
from detrellis.nn.prior import AtLevel, level_of
from detrellis.nn.proposals import ProposalHead
from detrellis.nn.queries import AnchorQueries, LearnedQueries, ProposalQueries, linear_reference, point_reference
from detrellis.nn.semantic import SemanticAligner, SemanticCrossAttention
from detrellis.nn.smca import IntraScaleAttention, ModulatedAttention, ModulatedPriors, read_point
from detrellis.nn.spatial import (
    AnchorPosition,
    ConditionalPosition,
    FixedPosition,
    ModulatedPosition,
    PointPosition,
    position_scale,
)
from detrellis.recipes.config import AlignerConfig, BackboneConfig, DetectorConfig

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


def build_backbone(config: BackboneConfig) -> ResNet | TimmBackbone:
    """The backbone, with pretrained weights where the recipe asks for them."""
    norm: Norm = config.normalisation
    resnet = config.name in RESNETS
    if config.dilation and not resnet:
        raise UserError(f"backbone {config.name}: dilation (DC5) exists for {', '.join(RESNETS)} only")
    if config.drop_path and resnet:
        raise UserError(f"backbone {config.name}: it has no drop path", "Leave detector.backbone.drop_path at 0.")
    try:
        if resnet:
            return ResNet(
                config.name, config.strides, pretrained=config.pretrained, norm=norm, dilation=config.dilation
            )
        return TimmBackbone(
            config.name, config.strides, pretrained=config.pretrained, norm=norm, drop_path=config.drop_path
        )
    except OSError as error:  # what torch.hub and the timm hub raise when they cannot reach their hosts
        raise UserError(
            f"the pretrained weights of {config.name} cannot be reached ({error})",
            "Connect once so that they are cached, or train from scratch with -o detector.backbone.pretrained=false.",
        ) from None
    except TypeError:
        if not config.drop_path:
            raise
        raise UserError(f"backbone {config.name} has no drop path", "Leave detector.backbone.drop_path at 0.") from None
    except NotImplementedError:
        raise UserError(f"backbone {config.name} cannot be dilated", "DC5 needs resnet50 or resnet101.") from None


def build_neck(config: DetectorConfig, channels: Sequence[int]) -> nn.Module:
    """From the backbone's maps to a memory."""
    semantic = config.cross_attention == "semantic"  # its regions reach into padding
    constants = {"temperature": config.position_temperature, "offset": config.position_offset}
    position = SineMap(config.width, **constants, blank=semantic)
    if config.encoder == "dense":
        return SingleScaleNeck(channels[-1], config.width, position, norm=bool(config.neck_norm))
    return MultiScaleNeck(channels, config.width, config.levels, position)


def build_encoder_attention(config: DetectorConfig, layer: int) -> nn.Module:
    """Self-attention of the tokens. With `intra_scale` the middle layer alone reads all levels together (SMCA)."""
    width, heads, dropout = config.width, config.heads, config.dropout
    if config.encoder == "deformable":
        return DeformableAttention(width, heads, config.levels, config.points)
    apart = config.encoder == "intra_scale" and layer != config.encoder_layers // 2
    return (IntraScaleAttention if apart else DenseAttention)(width, heads, dropout=dropout)


def build_cross_attention(config: DetectorConfig, layer: int) -> nn.Module:
    """Attention of the queries to the memory; what reads one level gets the layer's own."""
    width, heads, dropout = config.width, config.heads, config.dropout
    if config.cross_attention == "deformable":
        return DeformableAttention(width, heads, config.levels, config.points)
    if modulated(config):
        return ModulatedAttention(width, heads, dropout=dropout)
    attention: nn.Module
    if config.cross_attention == "semantic":
        heads = max(heads, config.aligner.keypoints or heads)
        aligner = SemanticAligner(width, heads, prior=config.smca, **config.aligner.model_dump())
        attention = SemanticCrossAttention(width, heads, aligner, dropout=dropout)
    elif config.cross_attention == "conditional":
        attention = ConditionalCrossAttention(width, heads, first=layer == 0, dropout=dropout)
    else:
        attention = DenseAttention(width, heads, dropout=dropout)
    several = config.levels > 1
    return AtLevel(attention, level_of(layer, config.decoder_layers, config.levels)) if several else attention


def modulated(config: DetectorConfig) -> bool:
    """Whether it is SMCA-DETR's decoder, whose queries carry the prior."""
    return config.smca and config.cross_attention == "dense"


def build_encoder(config: DetectorConfig) -> Encoder:
    """The encoder's layers."""
    width, dropout, hidden = config.width, config.dropout, config.encoder_hidden or config.hidden
    layers = [
        EncoderLayer(build_encoder_attention(config, i), _feed_forward(config, hidden), width, dropout=dropout)
        for i in range(config.encoder_layers)
    ]
    dense = config.encoder != "deformable"
    scale = position_scale(width) if dense and config.position_scale else None
    return Encoder(layers, references=not dense, position_scale=scale)


def build_queries(config: DetectorConfig, classes: int) -> nn.Module:
    """The module that yields the main queries."""
    width, count = config.width, config.query_count
    if config.queries == "learned":
        readers: dict[str, Callable[[int], nn.Module]] = {
            "deformable": linear_reference,
            "conditional": point_reference,
        }
        if config.smca:
            readers["dense"] = read_point
        reference = readers[config.cross_attention](width) if config.cross_attention in readers else None
        return LearnedQueries(width, count, learned_content=config.content == "learned", reference=reference)
    if config.queries == "anchors":
        return AnchorQueries(
            width,
            count,
            contents={"zero": 0, "shared": 1, "learned": count}[config.content],
            patterns=config.patterns,
            indicator=config.indicator,
            fixed_centres=config.fixed_centres,
            frozen=config.frozen_boxes,
        )
    rank_by = "first" if config.proposal_targets == "objectness" else "max"
    head = ProposalHead(width, classes, count, rank_by=rank_by, empty_compete=config.empty_compete)  # type: ignore[arg-type]
    return ProposalQueries(
        head,
        width,
        learned_content=config.queries == "mixed",
        derive_position=config.query_position == "queries",
    )


def build_position(config: DetectorConfig) -> nn.Module:
    """Where the decoder's queries look at each layer."""
    conditional = config.cross_attention == "conditional"
    if modulated(config):
        return ModulatedPriors(config.width, config.heads, config.decoder_layers, level_strides(config))
    if config.query_position == "queries":
        return ConditionalPosition(config.width) if conditional else FixedPosition()
    if config.cross_attention in ("dense", "semantic"):
        return PointPosition(config.width)
    return (
        ModulatedPosition(config.width) if conditional else AnchorPosition(config.width, scaled=config.position_scale)
    )


def build_decoder(config: DetectorConfig, classes: int) -> Decoder:
    """The decoder's layers and its heads."""
    width, dropout = config.width, config.dropout
    apart = config.cross_attention in ("conditional", "semantic")
    own = ConditionalSelfAttention if apart else SelfAttention
    layers = [
        DecoderLayer(
            own(width, config.heads, dropout=dropout),
            build_cross_attention(config, i),
            _feed_forward(config, config.hidden),
            width,
            dropout=dropout,
        )
        for i in range(config.decoder_layers)
    ]
    # Points that are sampled around need small boxes; proposals bring their size, and dense attention needs none.
    small = config.cross_attention == "deformable" and config.queries in ("learned", "anchors")
    return Decoder(
        layers,
        Heads(
            width,
            classes,
            len(layers),
            shared=config.shared_heads or config.refine == "none",
            size_bias=-2.0 if small else 0.0,
            softmax=config.scores == "softmax",
            iou_branch=config.iou_branch != "none",
        ),
        refine=config.refine,
        position=build_position(config),
        final_norm=config.final_norm,
        width=width,
        eps=config.eps,
    )


def _feed_forward(config: DetectorConfig, hidden: int) -> FeedForward:
    return FeedForward(config.width, hidden, dropout=config.dropout, activation=config.activation)


def _refuse(config: DetectorConfig) -> None:
    """Combinations of network parts that do not exist, each with what to use instead."""
    maps, boxes = len(config.backbone.strides), config.query_position == "boxes"
    learned, anchors = config.queries == "learned", config.queries == "anchors"
    placeless = learned and config.cross_attention == "dense" and not config.smca
    problems = {
        "queries=learned and query_position=boxes do not combine: learned queries are points. Take queries=anchors": (
            boxes and learned
        ),
        "queries=proposals and query_position=boxes do not combine: which gives the content? Take queries=mixed": (
            boxes and config.queries == "proposals"
        ),
        "queries=anchors have no position of their own. Take query_position=boxes": anchors and not boxes,
        f"{maps} backbone maps need levels={maps} or more": config.levels < maps,
        f"encoder=dense reads one map. Take levels=1 and backbone.strides=[{config.backbone.strides[-1]}]": (
            config.encoder == "dense" and (config.levels > 1 or maps > 1)
        ),
        "cross_attention=deformable and smca do not combine: it has no dense map that a prior could weigh. Take"
        " cross_attention=semantic or dense": config.smca and config.cross_attention == "deformable",
        "cross_attention=conditional and smca do not combine: it learns where to look by itself. Take"
        " cross_attention=semantic or dense": config.smca and config.cross_attention == "conditional",
        "cross_attention=semantic samples in boxes that queries learn. Take queries=anchors and query_position=boxes": (
            config.cross_attention == "semantic" and not (anchors and boxes)
        ),
        "aligner.* belongs to cross_attention=semantic": (
            config.cross_attention != "semantic" and config.aligner != AlignerConfig()
        ),
        "neck_norm=false does not exist with several levels: their projections have a norm": (
            config.neck_norm is False and config.levels > 1
        ),
        "smca with cross_attention=dense reads points off learned positions. Take queries=learned and refine=none": (
            modulated(config) and (not learned or config.refine != "none")
        ),
        f"aligner.keypoints={config.aligner.keypoints} neither divides heads={config.heads} nor makes heads that divide"
        f" width={config.width}": bool(config.aligner.keypoints) and not _fits(config),
        f"width={config.width} is not a multiple of heads={config.heads} and of 32": (
            config.width % config.heads or config.width % 32
        ),
        f"refine={config.refine} needs boxes or points to move, and DETR's queries have none. Take refine=none": (
            placeless and config.refine != "none"
        ),
        "content=shared, patterns, indicator, fixed_centres and frozen_boxes belong to queries=anchors": not anchors
        and (
            config.content == "shared"
            or any((config.patterns, config.indicator, config.fixed_centres, config.frozen_boxes))
        ),
        "scores=softmax and an IoU branch do not combine: the branch scales sigmoid scores": (
            config.scores == "softmax" and config.iou_branch != "none"
        ),
        "scores=softmax and two-stage proposals do not combine: they are ranked by sigmoid scores": (
            config.scores == "softmax" and not learned and not anchors
        ),
    }
    for problem, holds in problems.items():
        if holds:
            raise UserError(f"detector: {problem}", "Set the parts with -o detector.NAME=VALUE.")


def _fits(config: DetectorConfig) -> bool:
    """Whether heads can share the aligner's keypoints, or each have one."""
    keypoints = config.aligner.keypoints or config.heads
    if keypoints > config.heads:
        return config.width % keypoints == 0
    return config.heads % keypoints == 0


def level_strides(config: DetectorConfig) -> tuple[int, ...]:
    """Pixels that a cell of each level covers."""
    *finer, last = config.backbone.strides
    last //= 2 if config.backbone.dilation else 1
    return (*finer, *(last * 2**i for i in range(config.levels - len(finer))))


def build_detector(config: DetectorConfig, classes: int) -> Detector:
    """A detector for `classes` classes, initialised from the global random state."""
    _refuse(config)
    backbone = build_backbone(config.backbone)
    neck, encoder = build_neck(config, backbone.channels), build_encoder(config)
    decoder, queries = build_decoder(config, classes), build_queries(config, classes)
    parts = (backbone, neck, encoder, queries, decoder)
    return Detector(
        *parts,
        top_k=config.top_k,
        softmax=config.scores == "softmax",
        iou_branch=config.iou_branch,
        soft_nms=config.soft_nms,
    )


def capabilities(config: DetectorConfig) -> frozenset[str]:
    """What schemes may ask of a detector."""
    holds = {
        "sigmoid_scores": config.scores == "sigmoid",
        "box_queries": config.query_position == "boxes",
    }
    return frozenset(name for name, held in holds.items() if held)
