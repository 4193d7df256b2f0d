"""Combinations that do not exist, each refused with what to use instead; and what a detector's fields imply.

A field's own range stands in `config.py`; here is what only several fields together say. Importing this imports no
torch.
"""

from __future__ import annotations

import math
import warnings

from detrellis.errors import Advice, UserError
from detrellis.recipes.config import AlignerConfig, DetectorConfig, Recipe

# What a detector without the capability lacks, and what to use instead.
MISSING = {
    "box_queries": (
        "its queries are not boxes, and a disturbed box cannot be one of them",
        "take a detector whose queries are, such as tiny, dab-detr-r50 or dino-r50",
    ),
    "sigmoid_scores": (
        "its classes exclude each other (softmax)",
        "take a detector with sigmoid scores, such as conditional-detr-r50, or -o detector.scores=sigmoid",
    ),
}
GROUPS = 32  # of channels in every GroupNorm


def refuse(recipe: Recipe) -> None:
    """`UserError` for a recipe whose parts contradict each other; advice where they do the same work twice."""
    refuse_network(recipe.detector)
    _refuse_two_targets(recipe)
    _refuse_schemes(recipe)
    _refuse_pictures(recipe)


def _refuse_two_targets(recipe: Recipe) -> None:
    """Two parts of a recipe that both say what a positive's class should learn."""
    align, stable, loss = recipe.schemes.align, recipe.schemes.stable, recipe.loss.classification
    aims = align is not None and align.classification != "base"
    supervised = stable is not None and stable.supervised
    if aims and supervised:
        raise UserError(
            "schemes align and stable both set the classification target",
            "Keep one: -o schemes.align.classification=base, or -o schemes.stable.supervised=false.",
        )
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
        raise UserError(
            f"loss.classification={loss} cannot train {recipe.name}: {reason}, which cross-entropy teaches",
            f"Leave loss.classification at focal, which a softmax does not read, or {remedy}.",
        )


def _refuse_schemes(recipe: Recipe) -> None:
    schemes, detector = recipe.schemes, recipe.detector
    if schemes.group is not None and schemes.hybrid is not None:
        warnings.warn(Advice("schemes group and hybrid do the same work twice: one of them will do"), stacklevel=4)
    if schemes.group is not None and detector.patterns:
        raise UserError("scheme group and patterns do not combine", "Take -o detector.patterns=0.")
    if schemes.co is not None and detector.width % GROUPS:
        raise UserError(
            f"scheme co and detector.width={detector.width} do not combine: its heads normalise {GROUPS} groups of"
            " channels",
            f"Leave it out, or take -o detector.width={_rounded(detector.width, GROUPS)}.",
        )


def _refuse_pictures(recipe: Recipe) -> None:
    """Pictures that leave the backbone not one cell, or have no side left."""
    data, stride = recipe.data, level_strides(recipe.detector)[len(recipe.detector.backbone.strides) - 1]
    sides = (data.size,) if isinstance(data.size, int) else data.size
    given = f"data.size={data.size if isinstance(data.size, int) else list(data.size)}"
    if min(sides) < stride:
        raise UserError(
            f"{given} is too small for {recipe.name}, whose last map has a cell for every {stride} pixels",
            f"Take sides of {stride} and more; 256 is small.",
        )
    if data.max_side is not None and data.max_side < min(sides):
        raise UserError(
            f"data.max_side={data.max_side} is less than {given}, the short side",
            f"Take -o data.max_side={max(sides)} or more, or null.",
        )


def _rounded(width: int, step: int) -> int:
    return max(step, round(width / step) * step)


def refuse_network(config: DetectorConfig) -> None:
    """Combinations of network parts that do not exist, each with what to use instead."""
    _refuse_sizes(config)
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
        f"{maps} backbone.strides need levels={maps} or more": config.levels < maps,
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
        f"refine={config.refine} needs boxes or points to move, and DETR's queries have none. Take refine=none": (
            placeless and config.refine != "none"
        ),
        "content=shared, patterns, indicator, fixed_centres and frozen_boxes belong to queries=anchors": not anchors
        and (
            config.content == "shared"
            or any((config.patterns, config.indicator, config.fixed_centres, config.frozen_boxes))
        ),
        f"scores=softmax and iou_branch={config.iou_branch} do not combine: the branch scales sigmoid scores. Take"
        " iou_branch=none or scores=sigmoid": config.scores == "softmax" and config.iou_branch != "none",
        f"scores=softmax and queries={config.queries} do not combine: proposals are ranked by sigmoid scores. Take"
        " scores=sigmoid or queries=learned": config.scores == "softmax" and not learned and not anchors,
        "backbone.dilation (DC5) dilates the stage of stride 32, which backbone.strides leaves out. Take"
        " backbone.dilation=false": config.backbone.dilation and 32 not in config.backbone.strides,
        "encoder_points belongs to encoder=deformable. Take encoder_points=null": (
            config.encoder_points is not None and config.encoder != "deformable"
        ),
    }
    for problem, holds in problems.items():
        if holds:
            raise UserError(f"detector: {problem}", "Set the parts with -o detector.NAME=VALUE.")


def _refuse_sizes(config: DetectorConfig) -> None:
    """Widths that cannot be split as the parts need it."""
    normed = config.encoder != "dense" or bool(config.neck_norm)
    needs = {
        f"heads={config.heads}": config.heads,
        f"encoder_heads={config.encoder_heads}": config.encoder_heads or 1,
        "4, for the sines and cosines of two coordinates": 4,
        f"{GROUPS}, the groups that the neck's GroupNorm has": GROUPS if normed else 1,
    }
    for need, number in needs.items():
        if config.width % number:
            step = math.lcm(*needs.values())
            raise UserError(
                f"detector: width={config.width} is not a multiple of {need}",
                f"For example -o detector.width={_rounded(config.width, step)}.",
            )


def _fits(config: DetectorConfig) -> bool:
    """Whether heads can share the aligner's keypoints, or each have one."""
    keypoints = config.aligner.keypoints or config.heads
    if keypoints > config.heads:
        return config.width % keypoints == 0
    return config.heads % keypoints == 0


def modulated(config: DetectorConfig) -> bool:
    """Whether it is SMCA-DETR's decoder, whose queries carry the prior."""
    return config.smca and config.cross_attention == "dense"


def level_strides(config: DetectorConfig) -> tuple[int, ...]:
    """Pixels that a cell of each level covers."""
    *finer, last = config.backbone.strides
    last //= 2 if config.backbone.dilation else 1
    return (*finer, *(last * 2**i for i in range(config.levels - len(finer))))


def capabilities(config: DetectorConfig) -> frozenset[str]:
    """What schemes may ask of a detector."""
    holds = {
        "sigmoid_scores": config.scores == "sigmoid",
        "box_queries": config.query_position == "boxes",
    }
    return frozenset(name for name, held in holds.items() if held)
