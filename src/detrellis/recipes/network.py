"""From a `DetectorConfig` to the detector's modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from detrellis.detector import Detector
from detrellis.errors import UserError
from detrellis.nn.accelerate import accelerate
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
from detrellis.postprocess import Postprocess
from detrellis.recipes.config import BackboneConfig, DetectorConfig
from detrellis.recipes.refuse import level_strides, modulated, refuse_network

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


def build_backbone(config: BackboneConfig) -> ResNet | TimmBackbone:
    """The backbone, with pretrained weights where the recipe asks for them."""
    norm: Norm = config.normalisation
    resnet = config.name in RESNETS
    if config.dilation and not resnet:
        raise UserError(f"backbone {config.name}: dilation (DC5) exists for {', '.join(RESNETS)} only")
    if config.drop_path and resnet:
        raise UserError(f"backbone {config.name}: it has no drop path", "Leave detector.backbone.drop_path at 0.")
    shared: dict[str, Any] = {"pretrained": config.pretrained, "norm": norm, "frozen": config.frozen}
    try:
        if resnet:
            return ResNet(config.name, config.strides, dilation=config.dilation, **shared)
        return TimmBackbone(config.name, config.strides, drop_path=config.drop_path, **shared)
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
    width, heads, dropout = config.width, config.encoder_heads or config.heads, config.dropout
    if config.encoder == "deformable":
        return DeformableAttention(width, heads, config.levels, config.encoder_points or config.points)
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


def build_detector(config: DetectorConfig, classes: int) -> Detector:
    """A detector for `classes` classes, initialised from the global random state."""
    refuse_network(config)
    backbone = build_backbone(config.backbone)
    neck, encoder = build_neck(config, backbone.channels), build_encoder(config)
    decoder, queries = build_decoder(config, classes), build_queries(config, classes)
    accelerate(neck, encoder, queries, decoder)
    parts = (backbone, neck, encoder, queries, decoder)
    return Detector(
        *parts,
        postprocess=Postprocess(config.top_k, config.scores == "softmax", config.iou_branch, config.soft_nms),
    )
