"""Combinations of network parts that do not exist, each refused with what to use instead.
Importing this imports no torch.
"""

from __future__ import annotations

import math

from detrellis.errors import UserError
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.refuse_parts import (
    before_the_decoder,
    distributions,
    hybrid,
    plain,
    rivals,
    rounded,
    sampling,
)

GROUPS = 32  # of channels in every GroupNorm


def refuse_network(config: DetectorConfig) -> None:
    """Raise `UserError` for the first combination of network parts that does not exist,
    with what to use instead.
    """
    checks = (
        _sizes,
        plain,
        _combinations,
        hybrid,
        sampling,
        distributions,
        before_the_decoder,
        rivals,
        _scores,
        _masks,
    )
    for refused, problem, remedy in (row for check in checks for row in check(config)):
        if refused:
            raise UserError(f"detector: {problem}", remedy)


def _combinations(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """Whether it is refused, why, and what to take instead: parts that do not go together."""
    encoder = config.encoder
    attention = config.cross_attention
    queries = config.queries
    refine = config.decoder.refine
    strides = config.backbone.strides
    maps, learned = len(strides), queries.kind == "learned"
    placeless = learned and attention.kind == "dense" and not attention.smca
    scaled = attention.kind == "deformable" and attention.position_scale
    weights, scratch = config.backbone.weights, not config.backbone.pretrained
    return [
        (
            scratch and weights is not None,
            f"backbone.weights={weights} and backbone.pretrained=false contradict each other",
            "Set pretrained=true, or leave the file out.",
        ),
        (
            encoder.kind == "dense" and maps > 1,
            f"encoder.kind=dense reads one map, and backbone.strides names {maps}",
            f"Take -o 'detector.backbone.strides=[{strides[-1]}]', or another encoder.kind.",
        ),
        (
            encoder.kind != "dense" and maps > encoder.levels,
            f"{maps} backbone.strides need encoder.levels={maps} or more",
            f"Take -o detector.encoder.levels={maps}.",
        ),
        (
            config.backbone.dilation and 32 not in strides,
            "backbone.dilation (DC5) dilates the stage of stride 32, which backbone.strides "
            "leaves out",
            "Take -o detector.backbone.dilation=false.",
        ),
        (
            attention.kind == "semantic" and queries.kind != "anchors",
            "cross_attention.kind=semantic samples in learned boxes, and "
            f"queries.kind={queries.kind} has none",
            "Take -o detector.queries.kind=anchors.",
        ),
        (
            config.modulated and not (learned and refine == "none"),
            "cross_attention.kind=dense with smca reads points off learned positions, and they "
            "stay where they are",
            "Take -o detector.queries.kind=learned -o detector.decoder.refine=none.",
        ),
        (
            scaled and queries.position == "queries",
            "cross_attention.position_scale scales positions of boxes, and "
            f"queries.kind={queries.kind} has its own",
            "Take -o detector.cross_attention.position_scale=false.",
        ),
        (
            placeless and refine != "none",
            f"decoder.refine={refine} needs boxes or points to move, and DETR's queries have none",
            "Take -o detector.decoder.refine=none.",
        ),
    ]


def _scores(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """The same for what scores and boxes of queries are compared by."""
    queries = config.queries
    softmax = config.scores == "softmax"
    distinct = config.decoder.distinct is not None
    return [
        (
            softmax and config.iou_branch != "none",
            f"scores=softmax and iou_branch={config.iou_branch} do not combine: the branch "
            "scales sigmoid scores",
            "Take -o detector.iou_branch=none or -o detector.scores=sigmoid.",
        ),
        (
            distinct and config.decoder.refine == "none",
            "decoder.distinct and decoder.refine=none do not combine: it compares boxes that a "
            "layer has refined",
            "Take -o detector.decoder.distinct=null, or another decoder.refine where queries "
            "have boxes or points.",
        ),
        (
            distinct and softmax,
            "decoder.distinct and scores=softmax do not combine: what is dropped has no class, "
            "which a softmax has not",
            "Take -o detector.scores=sigmoid or -o detector.decoder.distinct=null.",
        ),
        (
            softmax and config.two_stage,
            f"scores=softmax and queries.kind={queries.kind} do not combine: proposals are "
            "ranked by sigmoid scores",
            "Take -o detector.scores=sigmoid or -o detector.queries.kind=learned.",
        ),
    ]


def _masks(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """The same for masks, and for queries that predict nothing else."""
    encoder, queries, strides = config.encoder, config.queries, config.backbone.strides
    masked = not config.boxes
    learned = queries.kind == "learned" and queries.content == "learned"
    base = "Take a recipe such as mask2former-r50."
    return [
        (
            config.masks is not None and config.level_strides[0] != 8,
            "masks are read from a map of stride 4 and the memory's map of stride 8, and this "
            f"memory's finest has stride {config.level_strides[0]}",
            "Take -o detector.masks=null, or a detector whose first level has it, such as "
            "dino-r50 or mask2former-r50.",
        ),
        (
            masked and config.masks is None,
            "cross_attention.kind=masked reads what masks show, and detector.masks is off",
            base,
        ),
        (
            masked and (encoder.kind != "deformable" or strides[0] != 8),
            "cross_attention.kind=masked needs a deformable encoder whose finest level has "
            f"stride 8, and this one is {encoder.kind}, of stride {strides[0]}",
            "Take -o detector.encoder.kind=deformable -o 'detector.backbone.strides=[8, 16, 32]'.",
        ),
        (
            masked and not learned,
            "cross_attention.kind=masked needs queries whose position and content are learned",
            "Take -o detector.queries.kind=learned -o detector.queries.content=learned.",
        ),
        (
            masked
            and not (
                config.decoder.final_norm
                and config.decoder.shared_heads
                and config.scores == "softmax"
            ),
            "cross_attention.kind=masked has a final norm, heads that all layers share, and "
            "softmax scores",
            "Take decoder.final_norm=true, decoder.shared_heads=true and scores=softmax.",
        ),
        (
            masked and (config.decoder.refine != "none" or config.iou_branch != "none"),
            "cross_attention.kind=masked predicts no boxes: there is nothing to refine, and no "
            "IoU to learn",
            "Take -o detector.decoder.refine=none -o detector.iou_branch=none.",
        ),
        (
            encoder.width not in (None, config.width) and not masked,
            f"encoder.width={encoder.width} is not width={config.width}, and only a masked "
            "decoder projects the memory",
            "Take -o detector.encoder.width=null.",
        ),
    ]


def _sizes(config: DetectorConfig) -> list[tuple[bool, str, str]]:
    """The same for widths and heads that cannot be split as the parts need it: every head, and
    every group of a GroupNorm, has equally many channels."""
    width, heads, attention = config.width, config.decoder.heads, config.cross_attention
    sines = {"4, for the sines and cosines of two coordinates": 4}
    cross = config.decoder.cross_heads
    decoder = {f"decoder.heads={heads}": heads, f"decoder.cross_heads={cross}": cross or 1} | sines
    encoder = {
        f"encoder.heads={config.encoder.heads}": 1
        if config.encoder.kind == "hybrid"
        else config.encoder.heads,
        **sines,
        f"{GROUPS}, the groups that the neck's GroupNorm has": GROUPS if _normed(config) else 1,
    }
    apart = config.encoder.width is not None
    parts = {"width": (width, decoder if apart else decoder | encoder)}
    if apart:
        parts["encoder.width"] = (config.memory_width, encoder)
    problems = [
        (
            value % n > 0,
            f"{name}={value} is not a multiple of {need}",
            f"For example -o detector.{name}={rounded(value, math.lcm(*needs.values()))}.",
        )
        for name, (value, needs) in parts.items()
        for need, n in needs.items()
    ]
    keypoints = (attention.keypoints if attention.kind == "semantic" else None) or heads
    shared = heads % keypoints == 0 if keypoints <= heads else width % keypoints == 0
    problem = (
        f"cross_attention.keypoints={keypoints} neither divides decoder.heads={heads} nor makes "
        "heads that divide"
    )
    remedy = f"For example -o detector.cross_attention.keypoints={heads}."
    return [*problems, (not shared, f"{problem} width={width}", remedy)]


def _normed(config: DetectorConfig) -> bool:
    """Whether the neck has GroupNorm:
    of one map only where it is asked to, of a pyramid's in coarser levels only.
    """
    encoder = config.encoder
    if config.backbone.pyramid and encoder.levels == len(config.backbone.strides) > 1:
        return False
    return encoder.kind not in ("hybrid", "projector") and (
        encoder.kind != "dense" or encoder.neck_norm
    )
