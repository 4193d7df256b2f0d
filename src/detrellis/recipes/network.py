"""From a `DetectorConfig` to the detector's modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from detrellis.detector import Detector
from detrellis.nn.accelerate import accelerate
from detrellis.nn.attention import DenseAttention, SelfAttention
from detrellis.nn.conditional import ConditionalCrossAttention, ConditionalSelfAttention
from detrellis.nn.decoder import CrossFirstLayer, Decoder, DecoderLayer
from detrellis.nn.deformable import DeformableAttention
from detrellis.nn.distribution import Bins
from detrellis.nn.encoder import Encoder, EncoderLayer, MemoryFusion
from detrellis.nn.heads import Heads
from detrellis.nn.hybrid import HybridNeck, csp_parts, elan_parts
from detrellis.nn.masked import MaskedDecoder, MaskHeads
from detrellis.nn.masks import MaskBranch
from detrellis.nn.mlp import FeedForward
from detrellis.nn.neck import MultiScaleNeck, SingleScaleNeck
from detrellis.nn.position import SineMap
from detrellis.nn.prior import AtLevel, OverLevels, level_of
from detrellis.nn.projector import Projector
from detrellis.nn.proposals import ProposalHead
from detrellis.nn.pyramid import PyramidNeck, SimplePyramid
from detrellis.nn.queries import (
    AnchorQueries,
    LearnedQueries,
    ProposalQueries,
    QuerySource,
    linear_reference,
    point_reference,
)
from detrellis.nn.ranked import RankLayers
from detrellis.nn.relation import PositionRelation
from detrellis.nn.salience import SalienceEncoder
from detrellis.nn.semantic import SemanticAligner, SemanticCrossAttention
from detrellis.nn.smca import IntraScaleAttention, ModulatedAttention, ModulatedPriors, read_point
from detrellis.nn.spatial import (
    AnchorPosition,
    BoxPosition,
    ConditionalPosition,
    FixedPosition,
    ModulatedPosition,
    PointPosition,
    position_scale,
)
from detrellis.postprocess import Postprocess
from detrellis.recipes.build_backbone import build_backbone
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.encoders import HybridEncoderConfig
from detrellis.recipes.refuse_network import refuse_network


def build_neck(config: DetectorConfig, channels: Sequence[int]) -> nn.Module:
    """From the backbone's maps to a memory."""
    if config.backbone.pyramid:
        width, strides = config.memory_width, config.backbone.strides
        inner = build_map_neck(config, [width] * len(strides), projected=False)
        return PyramidNeck(SimplePyramid(channels[-1], width, strides), inner)
    return build_map_neck(config, channels)


def build_map_neck(
    config: DetectorConfig, channels: Sequence[int], *, projected: bool = True
) -> nn.Module:
    """From a map of each stride to a memory. Not `projected`:
    several maps that have its width stay as they are.
    """
    if config.encoder.kind == "hybrid":
        return build_hybrid_neck(config, config.encoder, channels)
    semantic = config.cross_attention.kind == "semantic"  # its regions reach into padding
    constants = {"temperature": config.position_temperature, "offset": config.position_offset}
    position = SineMap(config.memory_width, **constants, blank=semantic)
    encoder = config.encoder
    if encoder.kind == "projector":
        eps = encoder.eps if encoder.norm == "layer" else None
        scales = [config.backbone.strides[-1] / stride for stride in encoder.strides]
        return Projector(
            channels, config.width, scales, position, blocks=encoder.blocks, layer_norm_eps=eps
        )
    if encoder.kind == "dense":
        return SingleScaleNeck(channels[-1], config.width, position, norm=encoder.neck_norm)
    return MultiScaleNeck(
        channels, config.memory_width, encoder.levels, position, projected=projected
    )


def build_hybrid_neck(
    config: DetectorConfig, encoder: HybridEncoderConfig, channels: Sequence[int]
) -> HybridNeck:
    """RT-DETR's encoder, which is a neck:
    its convolutions see the zeros that pad a batch, as a backbone's do.
    """
    inner = encoder.inner or config.width
    layers = []
    for _ in range(encoder.layers):
        attention = DenseAttention(inner, encoder.heads, dropout=config.dropout)
        feed_forward = FeedForward(inner, encoder.hidden, dropout=config.dropout, activation="gelu")
        layers.append(EncoderLayer(attention, feed_forward, inner, dropout=config.dropout))
    parts = (csp_parts if encoder.fuse_by == "csp" else elan_parts)(
        encoder.blocks, encoder.expansion
    )
    return HybridNeck(
        channels, config.width, inner, layers, parts, temperature=config.position_temperature
    )


def build_encoder_attention(config: DetectorConfig, layer: int) -> nn.Module:
    """Self-attention of the tokens.
    With `intra_scale` the middle layer alone reads all levels together (SMCA).
    """
    width, encoder = config.memory_width, config.encoder
    if encoder.kind in ("deformable", "salience"):
        return DeformableAttention(width, encoder.heads, encoder.levels, encoder.points)
    apart = encoder.kind == "intra_scale" and layer != encoder.layers // 2
    return (IntraScaleAttention if apart else DenseAttention)(
        width, encoder.heads, dropout=config.dropout
    )


def build_cross_attention(config: DetectorConfig, layer: int) -> nn.Module:
    """Attention of the queries to the memory; what reads one level gets the layer's own."""
    width = config.width
    heads = config.decoder.cross_heads or config.decoder.heads
    dropout = config.dropout
    chosen, levels = config.cross_attention, config.encoder.levels
    if chosen.kind == "deformable":
        discrete = chosen.sampling == "discrete"
        return DeformableAttention(
            *(width, heads, levels, chosen.points),
            offset_scale=chosen.offset_scale,
            discrete=discrete,
            projected=chosen.projected,
        )
    if config.modulated:
        return ModulatedAttention(width, heads, dropout=dropout)
    attention: nn.Module
    if chosen.kind == "semantic":
        heads = max(heads, chosen.keypoints or heads)
        options = chosen.model_dump(exclude={"kind", "smca"})
        aligner = SemanticAligner(width, heads, prior=chosen.smca, **options)
        attention = SemanticCrossAttention(width, heads, aligner, dropout=dropout)
    elif chosen.kind == "conditional":
        count = levels if chosen.within_boxes else 1
        parts = [
            ConditionalCrossAttention(width, heads, first=layer == 0, dropout=dropout)
            for _ in range(count)
        ]
        if count > 1:
            return OverLevels(parts, width)
        attention = parts[0]
    else:
        attention = DenseAttention(width, heads, dropout=dropout)
    return (
        AtLevel(attention, level_of(layer, config.decoder.layers, levels))
        if levels > 1
        else attention
    )


def build_encoder(config: DetectorConfig) -> Encoder | SalienceEncoder:
    """The encoder's layers; none where the neck has done its work."""
    width, dropout, encoder = config.memory_width, config.dropout, config.encoder
    if encoder.kind == "hybrid" or encoder.kind == "projector":
        return Encoder([], references=False)
    layers = [
        EncoderLayer(
            build_encoder_attention(config, i),
            build_feed_forward(config, width, encoder.hidden),
            width,
            dropout=dropout,
        )
        for i in range(encoder.layers)
    ]
    if encoder.kind == "salience":
        promising = [SelfAttention(width, encoder.heads, dropout=dropout) for _ in layers]
        options = {
            name: getattr(encoder, name) for name in ("level_ratios", "layer_ratios", "background")
        }
        return SalienceEncoder(layers, promising, width, encoder.levels, dropout=dropout, **options)
    if encoder.kind == "deformable":
        fusion = MemoryFusion(width, len(layers)) if encoder.fusion else None
        return Encoder(layers, references=True, fusion=fusion)
    return Encoder(
        layers,
        references=False,
        position_scale=position_scale(width) if encoder.position_scale else None,
    )


def build_queries(config: DetectorConfig, classes: int) -> QuerySource:
    """The module that yields the main queries."""
    width, queries = config.width, config.queries
    if queries.kind == "learned":
        reference = build_reference(config)
        return LearnedQueries(
            width, queries.count, learned_content=queries.content == "learned", reference=reference
        )
    if queries.kind == "anchors":
        return AnchorQueries(
            width,
            queries.count,
            contents={"zero": 0, "shared": 1, "learned": queries.count}[queries.content],
            patterns=queries.patterns,
            indicator=queries.indicator,
            fixed_centres=queries.fixed_centres,
            frozen=queries.frozen_boxes,
        )
    head = ProposalHead(
        width,
        classes,
        queries.count,
        rank_by="first" if config.objectness else "max",
        empty_compete=queries.empty_compete,
        distinct=queries.distinct,
        by_cells=queries.distinct_by == "cells",
        relative=config.box_encoding == "relative",
        masks=None if config.masks is None or config.objectness else config.masks.width,
        masks_first=queries.boxes_from_masks is not None,
        output_norm=config.decoder.double_norm,
        reverse=queries.kind == "mixed" and queries.smallest_on == "coarsest",
    )
    derived = queries.position == "queries"
    if queries.kind == "proposals":
        return ProposalQueries(head, width, content="boxes", derive_position=derived)
    options: dict[str, Any] = {"content": queries.content_from, "deltas": queries.deltas}
    options["boxes_from_masks"] = queries.boxes_from_masks
    return ProposalQueries(head, width, derive_position=derived, **options)


def build_reference(config: DetectorConfig) -> nn.Module | None:
    """What reads a point off a learned query's position, where the attention looks around one."""
    if config.modulated:
        return read_point(config.width)
    readers: dict[str, Callable[[int], nn.Module]] = {
        "deformable": linear_reference,
        "conditional": point_reference,
    }
    kind = config.cross_attention.kind
    return readers[kind](config.width) if kind in readers else None


def build_position(config: DetectorConfig) -> nn.Module:
    """Where the decoder's queries look at each layer."""
    attention = config.cross_attention
    if config.modulated:
        return ModulatedPriors(
            config.width, config.decoder.heads, config.decoder.layers, config.level_strides
        )
    if config.queries.position == "queries":
        return (
            ConditionalPosition(config.width)
            if attention.kind == "conditional"
            else FixedPosition()
        )
    if attention.kind == "conditional":
        return ModulatedPosition(config.width, within=attention.within_boxes)
    if attention.kind == "deformable" and attention.position == "box":
        return BoxPosition(config.width, attention.position_limit)
    if attention.kind == "deformable":
        return AnchorPosition(config.width, scaled=attention.position_scale)
    return PointPosition(config.width)


def build_decoder(config: DetectorConfig, classes: int) -> Decoder:
    """The decoder's layers and its heads."""
    width, dropout, decoder = config.width, config.dropout, config.decoder
    apart = config.cross_attention.kind in ("conditional", "semantic")
    self_attention = ConditionalSelfAttention if apart else SelfAttention
    layer = CrossFirstLayer if decoder.cross_first else DecoderLayer
    layers = [
        layer(
            self_attention(width, decoder.heads, dropout=dropout),
            build_cross_attention(config, i),
            build_feed_forward(config, width, decoder.hidden),
            width,
            dropout=dropout,
            gated=decoder.gated,
        )
        for i in range(decoder.layers)
    ]
    # Points that are sampled around need small boxes; proposals bring their size, and dense
    # attention needs none.
    small = config.cross_attention.kind == "deformable" and not config.two_stage
    fine, count = decoder.distributions, config.queries.count * max(config.queries.patterns, 1)
    return Decoder(
        layers,
        Heads(
            width,
            classes,
            len(layers),
            shared=decoder.shared_heads or decoder.refine == "none",
            size_bias=-2.0 if small else 0.0,
            softmax=config.scores == "softmax",
            iou_branch=config.iou_branch != "none",
            bins=None if fine is None else Bins(fine.bins, fine.scale, fine.reach),
            masks=None if config.masks is None else config.masks.width,
        ),
        refine=decoder.refine,
        position=build_position(config),
        final_norm=decoder.final_norm,
        width=width,
        eps=config.eps,
        distinct=decoder.distinct,
        double_norm=decoder.double_norm,
        before=decoder.initial_output,
        relative=config.box_encoding == "relative",
        relation=PositionRelation(decoder.heads) if decoder.relation else None,
        ranked=RankLayers(len(layers), count, width, classes) if decoder.ranked else None,
    )


def build_masked_decoder(config: DetectorConfig, classes: int) -> MaskedDecoder:
    """Mask2Former's decoder and its heads."""
    assert config.masks is not None
    assert config.cross_attention.kind == "masked"
    width, decoder, dropout = config.width, config.decoder, config.dropout
    layers = [
        CrossFirstLayer(
            SelfAttention(width, decoder.heads, dropout=dropout),
            DenseAttention(width, decoder.heads, dropout=dropout),
            build_feed_forward(config, width, decoder.hidden),
            width,
            dropout=dropout,
        )
        for _ in range(decoder.layers)
    ]
    return MaskedDecoder(
        layers,
        MaskHeads(width, classes, config.masks.width),
        levels=config.encoder.levels,
        width=width,
        memory_width=config.memory_width,
        position=SineMap(
            width, temperature=config.position_temperature, offset=config.position_offset
        ),
        project=config.cross_attention.project,
    )


def build_feed_forward(config: DetectorConfig, width: int, hidden: int) -> FeedForward:
    """A feed-forward block of this detector's."""
    return FeedForward(width, hidden, dropout=config.dropout, activation=config.activation)


def build_detector(config: DetectorConfig, classes: int) -> Detector:
    """A detector for `classes` classes, initialised from the global random state."""
    refuse_network(config)
    wanted = config.backbone
    backbone = build_backbone(
        wanted if config.masks is None else wanted.replace(strides=config.map_strides)
    )
    channels = backbone.channels if config.masks is None else backbone.channels[1:]
    neck, encoder = build_neck(config, channels), build_encoder(config)
    decoder = (
        build_decoder(config, classes) if config.boxes else build_masked_decoder(config, classes)
    )
    queries = build_queries(config, classes)
    masks = (
        None
        if config.masks is None
        else MaskBranch(backbone.channels[0], config.memory_width, config.masks.width)
    )
    accelerate(backbone, neck, encoder, queries, decoder)
    return Detector(
        backbone,
        neck,
        encoder,
        queries,
        decoder,
        postprocess=build_postprocess(config),
        masks=masks,
        size_divisor=config.pads_to,
    )


def build_postprocess(config: DetectorConfig) -> Postprocess:
    """How the detector's outputs become detections."""
    softmax = config.scores == "softmax"
    return Postprocess(
        config.top_k,
        softmax,
        config.iou_branch,
        config.soft_nms,
        mask_scores=config.masks is None or config.masks.scores,
        boxes_of_masks=not config.boxes,
    )
