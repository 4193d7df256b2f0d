"""Combinations that do not exist, each refused with what to use instead.

A field's own range stands beside it, and which fields a part has says its kind (`detector.py`);
here is what only several parts of a recipe together say, those of the network in
`refuse_network.py`. Importing this imports no torch.
"""

from __future__ import annotations

import warnings

from detrellis.errors import Advice, UserError
from detrellis.recipes.config import Recipe
from detrellis.recipes.data import STRONG
from detrellis.recipes.refuse_network import GROUPS, refuse_network
from detrellis.recipes.refuse_parts import rounded

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


def refuse(recipe: Recipe) -> None:
    """`UserError` for a recipe whose parts contradict each other;
    advice where they do the same work twice.
    """
    refuse_network(recipe.detector)
    _refuse_two_targets(recipe)
    _refuse_union(recipe)
    _refuse_schemes(recipe)
    _refuse_pictures(recipe)
    _refuse_optimizer(recipe)
    _refuse_schedule(recipe)
    _refuse_augmentation(recipe)


def _refuse_two_targets(recipe: Recipe) -> None:
    """Refuse two parts of a recipe that both say what the class logit of a positive should
    learn.
    """
    setters = recipe.schemes.target_setters()
    lasting = recipe.schemes.target_setters(to_the_end=True)
    loss = recipe.loss.classification
    stable = recipe.schemes.stable
    if len(setters) > 1:
        (one, remedy), (other, instead), *_ = setters.items()
        raise UserError(
            f"schemes {one} and {other} both set the classification target",
            f"Keep one: {remedy}, or {instead}.",
        )
    if lasting and loss != "focal" and (set(lasting), loss) != ({"stable"}, "psl"):
        ((one, remedy),) = lasting.items()
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
    """Refuse image sizes that leave the last map of the backbone without a cell,
    or no size at all.
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


def _refuse_optimizer(recipe: Recipe) -> None:
    """Refuse what a step cannot have together."""
    if recipe.optim.compile and recipe.optim.fully_shard:
        raise UserError(
            "optim.compile and optim.fully_shard do not combine: a compiled layer does not gather "
            "its parameters",
            "Take -o optim.compile=false, or -o optim.fully_shard=false.",
        )
    if recipe.optim.compile and recipe.optim.checkpointing:
        raise UserError(
            "optim.compile and optim.checkpointing do not combine: a compiled layer chooses itself "
            "what it keeps for the backward pass",
            "Take -o optim.compile=false, or -o optim.checkpointing=false.",
        )
    if recipe.optim.compile and recipe.detector.cross_attention.kind == "semantic":
        raise UserError(
            f"optim.compile and {recipe.name} do not combine: how many samples its RoIAlign takes "
            "is known only from the boxes",
            "Take -o optim.compile=false.",
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
    if schedule.flat and schedule.shape != "cosine":
        raise UserError(
            f"schedule.flat={schedule.flat:g} is where a cosine begins to fall, and "
            f"schedule.shape={schedule.shape} has none",
            "Take -o schedule.flat=0, or -o schedule.shape=cosine.",
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
            data.augment not in ("detr", "none") and isinstance(data.size, int),
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
