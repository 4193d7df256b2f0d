"""Parts of real-time detectors that do not go together with others: whether each case is refused,
why, and what to take instead. Importing this imports no torch."""

from __future__ import annotations

import math

from detrellis.recipes.backbones import EvaViTConfig, WindowViTConfig
from detrellis.recipes.detector import DetectorConfig


def rounded(width: int, step: int) -> int:
    """The multiple of `step` nearest to a width, at least one."""
    return max(step, round(width / step) * step)


def hybrid(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """For an encoder whose memory has no positions and exactly the backbone's levels."""
    encoder, attention, maps = config.encoder, config.cross_attention, len(config.backbone.strides)
    if encoder.kind != "hybrid":
        return []
    inner = encoder.inner or config.width
    step = math.lcm(encoder.heads, 4)
    return [
        (
            maps != encoder.levels,
            f"encoder.levels={encoder.levels} and {maps} backbone.strides: encoder.kind=hybrid "
            "makes no further levels",
            f"Take -o detector.encoder.levels={maps}.",
        ),
        (
            attention.kind != "deformable",
            f"encoder.kind=hybrid and cross_attention.kind={attention.kind}: the memory has no "
            "positions to read",
            "Take -o detector.cross_attention.kind=deformable.",
        ),
        (
            inner % step > 0,
            f"encoder.inner={inner} is not a multiple of encoder.heads={encoder.heads}, and of 4 "
            "for its positions",
            f"For example -o detector.encoder.inner={rounded(inner, step)}.",
        ),
    ]


def sampling(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """For the points of deformable attention, and where it takes positions from."""
    attention, queries, levels = config.cross_attention, config.queries, config.encoder.levels
    if attention.kind != "deformable":
        return []
    counts, boxes = attention.points, attention.position == "box"
    return [
        (
            not isinstance(counts, int) and len(counts) != levels,
            f"cross_attention.points={counts} and encoder.levels={levels} do not combine: each "
            "level needs a number",
            "Take one for all: -o detector.cross_attention.points=4.",
        ),
        (
            boxes and queries.position == "queries",
            "cross_attention.position=box derives positions from boxes, and "
            f"queries.kind={queries.kind} has its own",
            "Take -o detector.cross_attention.position=sine.",
        ),
        (
            boxes and attention.position_scale,
            "cross_attention.position_scale scales positions of sines, and "
            "cross_attention.position=box has none",
            "Take -o detector.cross_attention.position_scale=false.",
        ),
    ]


def distributions(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """For boxes that are means of distributions."""
    decoder, fine = config.decoder, config.decoder.distributions
    if fine is None:
        return []
    return [
        (
            fine.bins % 2 > 0,
            f"decoder.distributions.bins={fine.bins} is odd: as many lie on either side of the "
            "one in the middle",
            f"Take -o detector.decoder.distributions.bins={fine.bins + 1}.",
        ),
        (
            decoder.refine != "detached",
            f"decoder.distributions and decoder.refine={decoder.refine} do not combine: layers "
            "read boxes without gradient, which add to distributions with theirs",
            "Take -o detector.decoder.refine=detached.",
        ),
        (
            decoder.final_norm,
            "decoder.distributions and decoder.final_norm do not combine: boxes are read from "
            "what goes on, as it is",
            "Take -o detector.decoder.final_norm=false.",
        ),
        (
            decoder.cross_first,
            "decoder.distributions and decoder.cross_first do not combine: what is read first "
            "has no distributions",
            "Take -o detector.decoder.cross_first=false.",
        ),
        (
            config.scores == "softmax",
            "decoder.distributions and scores=softmax do not combine: their quality is added to "
            "all classes alike",
            "Take -o detector.scores=sigmoid.",
        ),
    ]


def before_the_decoder(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """For what queries begin with, and say before the first layer."""
    decoder, queries, sizes = config.decoder, config.queries, config.queries.boxes_from_masks
    return [
        (
            sizes is not None and (config.masks is None or config.objectness),
            f"queries.boxes_from_masks={sizes} needs proposals that learn masks, and these learn "
            "none",
            "Take -o 'detector.masks={}' -o detector.queries.proposal_targets=classes, or boxes_from_masks=null.",
        ),
        (
            decoder.double_norm and not decoder.final_norm,
            "decoder.double_norm repeats decoder.final_norm, which is off",
            "Take -o detector.decoder.final_norm=true.",
        ),
        (
            decoder.initial_output and (queries.kind == "learned" or not config.boxes),
            "decoder.initial_output is of the boxes that queries begin with, and "
            f"queries.kind={queries.kind} has none",
            "Take -o detector.decoder.initial_output=false.",
        ),
        (
            decoder.initial_output and decoder.distributions is not None,
            "decoder.initial_output and decoder.distributions do not combine: the queries have "
            "no distributions yet",
            "Take -o detector.decoder.initial_output=false.",
        ),
    ]


def plain(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """The same for a plain backbone and its projector,
    and for boxes that move relative to their size.
    """
    backbone, encoder = config.backbone, config.encoder
    projector = encoder.kind == "projector"
    relative = config.box_encoding == "relative" and config.queries.kind == "learned"
    problems = [
        (
            relative,
            "box_encoding=relative moves boxes, and queries.kind=learned has none",
            "Take -o detector.box_encoding=logits or -o detector.queries.kind=mixed.",
        )
    ]
    if not isinstance(backbone, WindowViTConfig):
        problem = (
            f"encoder.kind=projector reads maps of one stride, and backbone.kind={backbone.kind} "
            "has several"
        )
        row = (
            projector,
            problem,
            "Take another encoder.kind, or -o detector.backbone.kind=window_vit.",
        )
        return [*problems, row, *pyramid(config)]
    sides = (backbone.patch // 2, backbone.patch, 2 * backbone.patch)
    strides = encoder.strides if encoder.kind == "projector" else ()
    last = max(backbone.taps)
    return [
        *problems,
        (
            not projector,
            f"backbone.kind=window_vit has maps of one stride, which encoder.kind={encoder.kind} "
            "does not read",
            "Take -o detector.encoder.kind=projector, or -o detector.backbone.kind=hierarchical.",
        ),
        (
            config.masks is not None,
            "masks are read from a map of stride 4, which backbone.kind=window_vit has not",
            "Take -o detector.masks=null, or -o detector.backbone.kind=hierarchical.",
        ),
        (
            not set(strides) <= set(sides),
            f"encoder.strides={list(strides)} cannot be made of maps of stride "
            f"backbone.patch={backbone.patch}",
            f"Take some of {', '.join(str(side) for side in sides if side)}.",
        ),
        (
            backbone.width % backbone.heads > 0,
            f"backbone.width={backbone.width} is not a multiple of backbone.heads={backbone.heads}",
            f"For example -o detector.backbone.width={rounded(backbone.width, backbone.heads)}.",
        ),
        (
            any(block >= last for block in backbone.windowed),
            f"backbone.windowed={list(backbone.windowed)} names blocks that are not there: the "
            f"last map is read off after {last}",
            f"Blocks are counted from 0: take numbers below {last}.",
        ),
    ]


def pyramid(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """For a plain backbone whose one map a pyramid makes several of."""
    backbone = config.backbone
    problems = [
        (
            config.masks is not None and backbone.pyramid,
            "masks are read from a backbone's map of stride 4, which "
            f"backbone.kind={backbone.kind} has not",
            "Take -o detector.masks=null, or -o detector.backbone.kind=hierarchical.",
        )
    ]
    if not isinstance(backbone, EvaViTConfig):
        return problems
    step = 4 * backbone.heads
    return [
        *problems,
        (
            backbone.width % step > 0,
            f"backbone.width={backbone.width} is not a multiple of four times "
            f"backbone.heads={backbone.heads}: rotary positions turn a head's channels in pairs, "
            "by row and column",
            f"For example -o detector.backbone.width={rounded(backbone.width, step)}.",
        ),
        (
            any(block >= backbone.depth for block in backbone.global_blocks),
            f"backbone.global_blocks={list(backbone.global_blocks)} names blocks that are not "
            f"there: it has {backbone.depth}",
            f"Blocks are counted from 0: take numbers below {backbone.depth}.",
        ),
        (
            backbone.frozen != "all" and backbone.frozen > backbone.depth,
            f"backbone.frozen={backbone.frozen}: there are {backbone.depth} blocks",
            "Freeze fewer, or -o detector.backbone.frozen=all.",
        ),
    ]


def rivals(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """For what queries know of each other's boxes and scores, and for the cells in their boxes."""
    decoder = config.decoder
    queries = config.queries
    attention = config.cross_attention
    encoder = config.encoder
    softmax = config.scores == "softmax"
    masked = not config.boxes
    salient = encoder.kind == "salience"
    has_boxes = config.boxes and queries.kind != "learned"
    return [
        (
            attention.kind == "conditional"
            and attention.within_boxes
            and queries.position == "queries",
            f"cross_attention.within_boxes reads cells in boxes, and queries.kind={queries.kind} "
            "has points",
            "Take -o detector.queries.kind=anchors, as in dab-detr-r50.",
        ),
        (
            decoder.relation and not (decoder.refine != "none" and has_boxes),
            "decoder.relation compares boxes that layers refine, and with "
            f"queries.kind={queries.kind} and decoder.refine={decoder.refine} there are none",
            "Take -o detector.decoder.relation=false, or a recipe such as tiny or dab-detr-r50.",
        ),
        (
            decoder.ranked and softmax,
            "decoder.ranked and scores=softmax do not combine: queries are ranked by sigmoid "
            "scores",
            "Take -o detector.scores=sigmoid or -o detector.decoder.ranked=false.",
        ),
        (
            decoder.ranked and decoder.distributions is not None,
            "decoder.ranked and decoder.distributions do not combine: boxes are read from what "
            "goes on, as it is",
            "Take -o detector.decoder.ranked=false.",
        ),
        (
            masked and decoder.ranked,
            "cross_attention.kind=masked and decoder.ranked do not combine: its classes exclude "
            "each other",
            "Take -o detector.decoder.ranked=false.",
        ),
        (
            salient and not config.two_stage,
            "encoder.kind=salience ranks tokens by what proposes boxes, which "
            f"queries.kind={queries.kind} has not",
            "Take -o detector.queries.kind=mixed, as in salience-detr-r50.",
        ),
        (
            masked and decoder.cross_first,
            "cross_attention.kind=masked has cross-attention first whatever decoder.cross_first "
            "says",
            "Take -o detector.decoder.cross_first=false.",
        ),
    ]
