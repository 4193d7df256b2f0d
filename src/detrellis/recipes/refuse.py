"""Combinations that do not exist, each refused with what to use instead.

A field's own range stands beside it, and which fields a part has says its kind (`detector.py`);
here is what only several of them together say. Importing this imports no torch.
"""

from __future__ import annotations

import math
import warnings

from detrellis.errors import Advice, UserError
from detrellis.recipes.config import POLICIES, STRONG, Recipe
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

# What a detector without the capability lacks, and what to use instead.
MISSING = {
    "box_queries": (
        "its queries are not boxes, and a disturbed box cannot be one of them",
        "take a detector whose queries are, such as tiny, dab-detr-r50 or dino-r50",
    ),
    "proposals": (
        "its encoder proposes no boxes",
        "take a two-stage detector, such as tiny, dino-r50 or deformable-detr-r50-two-stage",
    ),
    "boxes_alone": (
        "it predicts masks, which are not learned one-to-many",
        "take a detector of boxes, such as tiny or dino-r50",
    ),
    "cross_first": (
        "its decoder layers have self-attention first, and queries are told apart before they "
        "could be supervised",
        "take -o detector.decoder.cross_first=true, or ms-deformable-detr-r50",
    ),
    "plain_layers": (
        "its decoder layers hand on more than queries and boxes, or it predicts masks",
        "switch off detector.masks and decoder.distinct, relation, ranked and distributions",
    ),
    "sigmoid_scores": (
        "its classes exclude each other (softmax)",
        "take a detector with sigmoid scores, such as conditional-detr-r50, or -o "
        "detector.scores=sigmoid",
    ),
}
GROUPS = 32  # of channels in every GroupNorm


def refuse(recipe: Recipe) -> None:
    """`UserError` for a recipe whose parts contradict each other; advice where they do the same
    work twice.
    """
    refuse_network(recipe.detector)
    _refuse_two_targets(recipe)
    _refuse_union(recipe)
    _refuse_schemes(recipe)
    _refuse_pictures(recipe)
    _refuse_schedule(recipe)
    _refuse_augmentation(recipe)


def _refuse_two_targets(recipe: Recipe) -> None:
    """Refuse two parts of a recipe that both say what the class logit of a positive should
    learn.
    """
    setters = recipe.schemes.target_setters
    loss = recipe.loss.classification
    stable = recipe.schemes.stable
    if len(setters) > 1:
        (one, remedy), (other, instead), *_ = setters.items()
        raise UserError(
            f"schemes {one} and {other} both set the classification target",
            f"Keep one: {remedy}, or {instead}.",
        )
    if setters and loss != "focal" and (set(setters), loss) != ({"stable"}, "psl"):
        ((one, remedy),) = setters.items()
        raise UserError(
            f"loss.classification={loss} and scheme {one} both set the classification target",
            f"Leave -o loss.classification out, or {remedy}.",
        )
    if recipe.schemes.rank is not None and stable is not None and stable.modulated:
        raise UserError(
            "schemes stable and rank both set the matching cost",
            "Leave one out, or take -o schemes.stable.modulated=false.",
        )
    if loss != "focal" and recipe.detector.scores == "softmax":
        reason, remedy = MISSING["sigmoid_scores"]
        raise UserError(
            f"loss.classification={loss} cannot train {recipe.name}: {reason}, which "
            "cross-entropy teaches",
            f"Leave loss.classification at focal, which a softmax does not read, or {remedy}.",
        )


def _refuse_union(recipe: Recipe) -> None:
    """Refuse to unite the matches of outputs whose classes or queries are others."""
    if not recipe.loss.union:
        return
    remedy = "Leave it out"
    if recipe.detector.scores == "softmax":
        reason = MISSING["sigmoid_scores"][0]
        raise UserError(
            f"loss.union cannot train {recipe.name}: {reason}, and boxes have no matches of "
            "their own",
            f"{remedy}.",
        )
    if recipe.detector.objectness:
        raise UserError(
            f"loss.union cannot train {recipe.name}: all tokens of its encoder learn whether "
            "they are objects",
            f"{remedy}, or take -o detector.queries.proposal_targets=classes.",
        )


def _refuse_schemes(recipe: Recipe) -> None:
    """Refuse schemes that cannot train this detector, and advise against two that do the same."""
    schemes, detector = recipe.schemes, recipe.detector
    if schemes.group is not None and schemes.hybrid is not None:
        warnings.warn(
            Advice("schemes group and hybrid do the same work twice: one of them will do"),
            stacklevel=4,
        )
    if schemes.group is not None and detector.queries.patterns:
        raise UserError(
            "scheme group and patterns do not combine", "Take -o detector.queries.patterns=0."
        )
    if schemes.co is not None and detector.width % GROUPS:
        raise UserError(
            f"scheme co and detector.width={detector.width} do not combine: its heads normalise "
            f"{GROUPS} groups of channels",
            f"Leave it out, or take -o detector.width={rounded(detector.width, GROUPS)}.",
        )


def _refuse_pictures(recipe: Recipe) -> None:
    """Refuse image sizes that leave the last map of the backbone without a cell, or no size at
    all.
    """
    data = recipe.data
    stride = recipe.detector.level_strides[len(recipe.detector.backbone.strides) - 1]
    sides = (data.size,) if isinstance(data.size, int) else data.size
    given = f"data.size={data.size if isinstance(data.size, int) else list(data.size)}"
    if min(sides) < stride:
        raise UserError(
            f"{given} is too small for {recipe.name}, whose last map has a cell for every "
            f"{stride} pixels",
            f"Take sides of {stride} and more; 256 is small.",
        )
    if data.max_side is not None and data.max_side < min(sides):
        raise UserError(
            f"data.max_side={data.max_side} is less than {given}, the short side",
            f"Take -o data.max_side={max(sides)} or more, or null.",
        )


def _refuse_schedule(recipe: Recipe) -> None:
    """Refuse a schedule that says one thing twice, or that trains what is not frozen later."""
    schedule = recipe.schedule
    if schedule.unfreeze_after and not recipe.detector.backbone.frozen:
        raise UserError(
            f"schedule.unfreeze_after={schedule.unfreeze_after}, and detector.backbone.frozen=0 "
            "freezes nothing",
            "Say how many stages: -o detector.backbone.frozen=2, or all.",
        )
    if schedule.unfreeze_after and recipe.optim.fully_shard:
        raise UserError(
            f"schedule.unfreeze_after={schedule.unfreeze_after} and optim.fully_shard do not "
            "combine: what is frozen is sharded as such",
            "Take -o optim.fully_shard=false, or -o schedule.unfreeze_after=0.",
        )
    if schedule.unfreeze_after >= schedule.epochs:
        raise UserError(
            f"schedule.unfreeze_after={schedule.unfreeze_after}: the whole run has "
            f"{schedule.epochs} epochs",
            "Take fewer than that, or 0 to keep the backbone frozen for the whole run.",
        )
    if schedule.warmup and schedule.warmup_steps:
        raise UserError(
            f"schedule: warmup={schedule.warmup:g} and warmup_steps={schedule.warmup_steps} both "
            "set the warm-up",
            "Take -o schedule.warmup=0, or -o schedule.warmup_steps=0.",
        )


def _refuse_augmentation(recipe: Recipe) -> None:
    """Refuse augmentation that the policy or the image size of a recipe do not go with."""
    for refused, problem, remedy in _augmentation(recipe):
        if refused:
            raise UserError(problem, remedy)


def _augmentation(recipe: Recipe) -> list[tuple[bool, str, str]]:
    """Whether each is refused, why, and what to take instead."""
    data, masked = recipe.data, recipe.detector.masks is not None
    policy = f"data.augment={data.augment}"
    pair = [data.size] * 2 if isinstance(data.size, int) else list(data.size)
    strong = {name: value for name, value in data.strong().items() if name in STRONG}
    kept = {"detr": ("photometric",), "lsj": (), "none": ()}.get(data.augment, tuple(strong))
    idle = next((name for name in strong if name not in kept), None)
    fits = not isinstance(data.size, int) and data.keep_aspect and not data.match_orientation
    return [
        (
            (data.augment in POLICIES or data.augment == "lsj") and isinstance(data.size, int),
            f"{policy} needs one size for all images, and data.size={data.size} is a short side",
            f"Take -o 'data.size={pair}'.",
        ),
        (
            idle is not None,
            f"{policy} goes without data.{idle}",
            "Take -o data.augment=fixed (or small, realtime), with data.size=[height, width]; "
            "or leave it out.",
        ),
        (
            data.augment == "lsj" and pair[0] != pair[1],
            f"{policy} needs a square, and data.size={pair} is none",
            f"Take -o 'data.size={[max(pair)] * 2}'.",
        ),
        (
            (data.sides or data.sides_max) is not None and data.augment != "detr",
            f"data.sides and data.sides_max belong to data.augment=detr, and this is {policy}",
            "Take -o data.sides=null -o data.sides_max=null.",
        ),
        (
            data.sides_max is not None and data.sides is None,
            f"data.sides_max={data.sides_max} limits images whose short sides are drawn, and "
            "data.sides is off",
            "Take -o data.sides_max=null, or -o "
            f"'data.sides={round(0.6 * max(pair))}-{max(pair)}'.",
        ),
        (
            data.pad is not None and not (fits and data.augment in ("lsj", "none")),
            f"data.pad={data.pad} needs data.size=[height, width], kept aspects, and "
            "data.augment=lsj or none",
            "Take -o data.pad=null.",
        ),
        (
            data.pad is not None and masked,
            f"data.pad={data.pad} and detector.masks do not combine: masks are of the picture "
            "without its padding",
            "Take -o data.pad=null.",
        ),
    ]


def refuse_network(config: DetectorConfig) -> None:
    """Raise `UserError` for the first combination of network parts that does not exist, with what
    to use instead.
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
    found = [
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
    return [*found, (not shared, f"{problem} width={width}", remedy)]


def _normed(config: DetectorConfig) -> bool:
    """Whether the neck has GroupNorm: of one map only where it is asked to, of a pyramid's in
    coarser levels only.
    """
    encoder = config.encoder
    if config.backbone.pyramid and encoder.levels == len(config.backbone.strides) > 1:
        return False
    return encoder.kind not in ("hybrid", "projector") and (
        encoder.kind != "dense" or encoder.neck_norm
    )
