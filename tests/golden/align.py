"""Checks of Align-DETR, of the losses and matchers that it is compared with,
and of hybrid matching.

Prefixes of the recorded outputs: `paper_` the paper's formulas, `rec_` with the quality's floor,
`iabce64_` the first version's loss, `off_` the released codes in float32, whose epsilons and
weaknesses their tolerances allow for.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, pairwise_giou
from detrellis.losses import bce_loss, varifocal_loss
from detrellis.matching import Hungarian, Match, MatchingCost, assign, columns
from detrellis.nn.queries import LearnedQueries
from detrellis.pairs import SoftTarget, iou_target, pair_up, quality, scaled_iou_target
from detrellis.postprocess import Postprocess
from detrellis.schemes.align import Align, align_loss, rank_weight
from detrellis.schemes.config import AlignConfig, HybridConfig, StableConfig
from detrellis.schemes.denoising import lay_out, positives
from detrellis.schemes.hybrid import Hybrid
from detrellis.schemes.ranks import rank
from detrellis.schemes.stable import Stable, modulated_term, modulation
from detrellis.set_loss import CLASSIFICATION, SetLoss
from detrellis.supervision import Supervision, supervise
from detrellis.types import Assignment, DecoderOutput, Targets

from .arrays import Arrays

Classification = Literal["align", "ia_bce"]
# What each prefix holds: the loss, the floor of the quality, the epsilon of the IoU.
VARIANTS: dict[str, tuple[Classification, float, float]] = {
    "paper": ("align", 0.0, 0.0),
    "rec": ("align", 0.01, 0.0),
    "iabce64": ("ia_bce", 0.01, 0.0),
    "off": ("ia_bce", 0.01, 1e-6),
}


def near(actual: Tensor, expected: Tensor, what: str, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(
        actual.detach(),
        expected.to(actual.dtype),
        atol=atol,
        rtol=rtol,
        msg=lambda m: f"{what}: {m}",
    )


def targets_of(a: Arrays) -> Targets:
    return Targets(a["gt_labels"].long(), a["gt_boxes"].view(-1, 4), tuple(a["gt_counts"].tolist()))


def scheme(
    a: Arrays, variant: str, *, k: int, k_last: int | None = None, k_encoder: int | None = None
) -> Align:
    classification, floor, eps = VARIANTS[variant]
    dials = {name: float(a[name]) for name in ("alpha", "gamma", "tau")}
    last = k if k_last is None else k_last
    config = AlignConfig(
        k=k,
        k_last=last,
        k_encoder=k_encoder,
        classification=classification,
        floor=floor,
        iou_eps=eps,
        **dials,
    )
    return Align(config)


def one_layer(logits: Tensor, boxes: Tensor) -> DecoderOutput:
    return DecoderOutput(logits[None], boxes[None], boxes[None])


def in_target_order(found: Assignment, targets: Targets) -> list[Tensor]:
    """Image, query, target of its image, sorted as the files are; and the order."""
    offsets = torch.tensor(targets.offsets)
    own = found.target - offsets[found.image]
    rows = list(zip(found.image.tolist(), own.tolist(), found.query.tolist(), strict=True))
    order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), dtype=torch.int64)
    return [found.image[order], found.query[order], own[order], order]


def check_align(a: Arrays) -> None:
    """One layer: matches, ranks, targets, losses and gradients of every variant the file holds."""
    targets, k = targets_of(a), a.number("k")
    output = one_layer(a["logits"], a["boxes"])
    supervision = scheme(a, "rec", k=k).supervision(Supervision())
    found = assign([Match(output, targets, supervision.assign)])[0]
    image, query, own, order = in_target_order(found, targets)
    assert torch.equal(image, a["paper_match_img"])
    assert torch.equal(query, a["paper_match_src"])
    assert torch.equal(own, a["paper_match_tgt"])
    assert isinstance(supervision.assign, Hungarian)
    queries = a["logits"].shape[1]
    allowed = [
        supervision.assign.candidates.of(0, 1, queries=queries, targets=n) if n else n
        for n in targets.sizes
    ]
    assert allowed == [
        k if n else 0 for k, n in zip(a["paper_k_eff"].tolist(), targets.sizes, strict=True)
    ]
    agrees = torch.equal(a["off_match_src"], a["paper_match_src"])
    for variant in VARIANTS:
        if f"{variant}_loss_class" in a and (variant != "off" or agrees):
            _check_variant(a, variant, found, order, k)


def check_align_denoising(a: Arrays) -> None:
    targets = targets_of(a)
    layout = lay_out(targets, a.number("dn_num"), kinds=2)
    assert layout.slots == a.number("dn_num") * a.number("single_padding")
    found = positives(layout, 1)
    image, query, own, order = in_target_order(found, targets)
    assert torch.equal(image, a["paper_match_img"])
    assert torch.equal(query, a["paper_match_src"])
    assert torch.equal(own, a["paper_match_tgt"])
    for variant in ("paper", "rec", "off"):
        if f"{variant}_loss_class" in a:  # of one candidate each, whatever k is
            _check_variant(a, variant, found, order, 1, boxes="num_boxes_times_dn")


def _tolerances(a: Arrays, variant: str) -> dict[str, float]:
    """Relative ones of losses and gradients,
    and of how far the released code's float32 strays in this file.
    """
    if variant != "off":
        return {"loss": 1e-9, "grad": 1e-9, "atol": 1e-12}
    small = len(a["gt_boxes"]) > 0 and float(a["gt_boxes"][:, 2:].min()) < 0.01
    wild = float(a["logits"].abs().max()) > 15
    return {
        "loss": 1e-3 if wild else 1e-4 if small else 1e-5,
        "grad": 1e-3,
        "atol": 5e-4 if small else 2e-6,
    }


def _check_variant(
    a: Arrays,
    variant: str,
    found: Assignment,
    order: Tensor,
    k: int,
    boxes: str = "paper_num_boxes",
) -> None:
    targets, align = targets_of(a), scheme(a, variant, k=k)
    rule = align.supervision(Supervision()).rule
    logits, predicted = a.variable("logits"), a.variable("boxes")
    output, tolerance = one_layer(logits, predicted), _tolerances(a, variant)
    assert isinstance(rule, SetLoss)
    pairs = pair_up(output, targets, found, rule.iou_eps)
    value = partial(near, rtol=tolerance["loss"], atol=max(tolerance["atol"], 1e-12))

    q = quality(pairs, align.config.alpha)
    ranks = rank(q, found.candidate_set)[order]
    expected = {
        "p": pairs.logits.sigmoid()[order],
        "iou": pairs.iou[order],
        # The others' files hold it unfloored.
        "quality": (q.clamp(min=align.config.floor) if variant == "off" else q)[order],
        "target": align.soft_target(pairs).target[order],
        "rank_weight": rank_weight(ranks.double(), align.config.tau),
    }
    tied = bool((q <= 0.01).any())  # floored alike, the released code ranks them in any order
    for name, ours in expected.items():
        if f"{variant}_{name}" in a and not (variant == "off" and tied):
            value(ours, a[f"{variant}_{name}"], f"{variant} {name}")
    if f"{variant}_rank" in a and not (variant == "off" and tied):
        assert torch.equal(ranks, a[f"{variant}_rank"])

    terms = rule(output, targets, found, a[boxes])
    if f"{variant}_pos_loss_class" in a:
        per_pair = rule.positive(pairs.logits, align.soft_target(pairs).target)[order] / a[boxes]
        value(per_pair, a[f"{variant}_pos_loss_class"], "positives' loss")
    if variant == "off" and tied:
        return
    for name, key in (("class", "class"), ("box", "bbox"), ("giou", "giou")):
        if f"{variant}_loss_{key}" in a and a[f"{variant}_loss_{key}"].isfinite():
            value(terms[name][0], a[f"{variant}_loss_{key}"], f"{variant} {name}")
    gradients = {
        "grad_logits_class": torch.autograd.grad(terms["class"].sum(), logits, retain_graph=True)[
            0
        ],
        "grad_boxes_bbox": torch.autograd.grad(terms["box"].sum(), predicted, retain_graph=True)[0],
        "grad_boxes_giou": torch.autograd.grad(terms["giou"].sum(), predicted)[0],
    }
    assert all(g.isfinite().all() for g in gradients.values())
    for name, ours in gradients.items():
        if f"{variant}_{name}" in a and a[f"{variant}_{name}"].isfinite().all():
            near(
                ours,
                a[f"{variant}_{name}"],
                f"{variant} {name}",
                rtol=tolerance["grad"],
                atol=tolerance["atol"],
            )


def check_full_criterion(a: Arrays) -> None:
    """All layers, the proposals and denoising through the training step's own functions."""
    targets = targets_of(a)
    encoder, *between, last = a["match_num"].tolist()
    assert len(between) == len(a["logits"]) - 1
    assert len(set(between)) <= 1, "a number for each layer is not offered"
    middle = between[0] if between else last
    layout = lay_out(targets, a.number("dn_num"), kinds=2)
    count = torch.tensor(float(len(targets.labels)), dtype=torch.float64)
    for variant, loss_rtol, grad_rtol, atol in (
        ("rec", 1e-9, 1e-9, 1e-11),
        ("off", 1e-5, 1e-3, 2e-6),
    ):
        inputs = [
            a.variable(f"{part}{name}")
            for part in ("", "enc_", "dn_")
            for name in ("logits", "boxes")
        ]
        supervision = scheme(a, variant, k=middle, k_last=last, k_encoder=encoder).supervision(
            Supervision()
        )
        known = supervision.known(positives(layout, len(a["logits"])))
        tasks = [
            supervision.task(
                "main", DecoderOutput(inputs[0], inputs[1], inputs[1]), targets, count
            ),
            supervision.proposals().task(
                "proposals", one_layer(inputs[2], inputs[3]), targets, count
            ),
            known.task(
                "dn", DecoderOutput(inputs[4], inputs[5], inputs[5]), targets, count * layout.groups
            ),
        ]
        losses, _ = supervise(tasks)
        names = {"main": "", "proposals": "_enc", "dn": "_dn"}
        terms = {"class": "class", "box": "bbox", "giou": "giou"}
        for key, value in losses.items():
            task, term, layer = key.split("/")
            suffix = (
                "" if task == "proposals" or int(layer) == len(a["logits"]) - 1 else f"_{layer}"
            )
            expected = a[f"{variant}_loss_{terms[term]}{names[task]}{suffix}"]
            near(
                value / supervision.weights[term],
                expected,
                f"{variant} {key}",
                rtol=loss_rtol,
                atol=atol,
            )
        total = torch.stack(list(losses.values())).sum()
        near(total, a[f"{variant}_total"], "total", rtol=loss_rtol, atol=atol)
        total.backward()
        parts = [f"{part}{name}" for part in ("", "enc_", "dn_") for name in ("logits", "boxes")]
        for part, tensor in zip(parts, inputs, strict=True):
            assert tensor.grad is not None
            near(
                tensor.grad,
                a[f"{variant}_grad_{part}"],
                f"{variant} {part}",
                rtol=grad_rtol,
                atol=atol,
            )


def check_mixed_matcher(a: Arrays) -> None:
    _check_matcher(a, MatchingCost(), a.number("k"))


def check_pmc(a: Arrays) -> None:
    """Position-modulated cost, without the constant 2 that does not change a matching."""
    base = Supervision()
    found = Stable(StableConfig(beta=float(a["cec_beta"]))).supervision(base)
    assert isinstance(found.assign, Hungarian)
    cost, targets = found.assign.cost, targets_of(a)
    for image, (first, size) in enumerate(zip(targets.offsets, targets.sizes, strict=True)):
        own = slice(first, first + size)
        overlap = pairwise_giou(
            cxcywh_to_xyxy(a["boxes"][image]), cxcywh_to_xyxy(targets.boxes[own])
        )
        p = columns(a["logits"][image], targets.labels[own]).sigmoid()
        modulated = p * modulation(overlap) ** float(a["cec_beta"])
        near(modulated, a[f"paper_pmc_prob_{image}"], "probability", rtol=1e-6, atol=1e-7)
        term = modulated_term(a["logits"][image], targets.labels[own], overlap)
        assert term.shape == overlap.shape
    _check_matcher(a, cost, 1, giou_cost=1.0)


def _check_matcher(a: Arrays, cost: MatchingCost, k: int, giou_cost: float = 0.0) -> None:
    """`giou_cost`: the file's GIoU cost is `1 - GIoU` instead of `-GIoU`."""
    targets, align = targets_of(a), Align(AlignConfig(k=k, k_last=k))
    base = Supervision(Hungarian(cost))
    supervision = align.supervision(base)
    found = assign([Match(one_layer(a["logits"], a["boxes"]), targets, supervision.assign)])[0]
    image, query, own, _ = in_target_order(found, targets)
    assert torch.equal(image, a["paper_match_img"])
    assert torch.equal(query, a["paper_match_src"])
    assert torch.equal(own, a["paper_match_tgt"])
    for b, (first, size) in enumerate(zip(targets.offsets, targets.sizes, strict=True)):
        rows = slice(first, first + size)
        if f"paper_cost_{b}" in a and size:
            ours = cost(a["logits"][b], a["boxes"][b], targets.labels[rows], targets.boxes[rows])
            near(ours + cost.giou * giou_cost, a[f"paper_cost_{b}"], "cost", rtol=1e-6, atol=1e-6)


def check_hybrid(a: Arrays) -> None:
    """All layers of H-DETR's two branches, with the focal and the Align Loss."""
    targets, first = targets_of(a), a.number("num_queries_one2one")
    count = torch.tensor(float(len(targets.labels)), dtype=torch.float64)
    source = LearnedQueries(8, 4, learned_content=True, reference=None)
    config = HybridConfig(
        k=a.number("k_one2many"),
        queries=a.number("num_queries_one2many"),
        weight=float(a["lambda_one2many"]),
    )
    hybrid = Hybrid(config, source)
    plain = Supervision(weights={"class": 2.0, "box": 5.0, "giou": 2.0})
    aligned = scheme(a, "rec", k=1).supervision(plain)
    for variant, base, rtol, atol in (("off", plain, 1e-5, 2e-6), ("rec", aligned, 1e-9, 1e-12)):
        logits, boxes = a.variable("logits"), a.variable("boxes")
        output = DecoderOutput(logits, boxes, boxes)
        main, second = (
            output.map(lambda t, part=part: t[:, :, part])
            for part in (slice(0, first), slice(first, None))
        )
        several = hybrid.supervision_of(base)
        tasks = [
            base.task("main", main, targets, count),
            several.task("hybrid", second, targets, hybrid.normaliser(count), weight=config.weight),
        ]
        losses, _ = supervise(tasks)
        for key, value in losses.items():
            task, term, layer = key.split("/")
            name = {"class": "ce", "box": "bbox", "giou": "giou"}[term]
            last = int(layer) == len(logits) - 1
            suffix = ("" if last else f"_{layer}") + ("_one2many" if task == "hybrid" else "")
            weighted = a[f"{variant}_loss_{name}{suffix}"] * base.weights[term]
            near(value, weighted, f"{variant} {key}", rtol=rtol, atol=atol)
            if variant == "rec":
                _check_ranks(a, tasks[task == "hybrid"].match, int(layer), suffix)
        total = torch.stack(list(losses.values())).sum()
        if f"{variant}_total" in a:
            near(total, a[f"{variant}_total"], "total", rtol=rtol, atol=atol)
        total.backward()
        for name, tensor in (("logits", logits), ("boxes", boxes)):
            assert tensor.grad is not None
            if f"{variant}_grad_{name}" in a:
                near(
                    tensor.grad,
                    a[f"{variant}_grad_{name}"],
                    f"{variant} {name}",
                    rtol=1e-3,
                    atol=2e-6,
                )


def _check_ranks(a: Arrays, match: Match, layer: int, suffix: str) -> None:
    found = assign([match])[0]
    found = Assignment(*(t[found.layer == layer] for t in found))
    ranks = rank(
        quality(pair_up(match.output, match.targets, found), float(a["alpha"])), found.candidate_set
    )
    image, query, own, order = in_target_order(found, match.targets)
    for ours, name in (
        (image, "match_img"),
        (query, "match_src"),
        (own, "match_tgt"),
        (ranks[order], "rank"),
    ):
        assert torch.equal(ours, a[f"rec_{name}{suffix}"]), name


def check_compare(a: Arrays) -> None:
    """Table 3's losses on one matching."""
    targets, zero = targets_of(a), torch.zeros(len(a["match_src"]), dtype=torch.int64)
    offsets = torch.tensor(targets.offsets)
    found = Assignment(
        zero,
        a["match_img"],
        a["match_src"],
        offsets[a["match_img"]] + a["match_tgt"],
        torch.arange(len(zero)),
    )
    align = Align(AlignConfig(k=1))
    scaled = SetLoss(
        lambda pairs: _best_is_one(iou_target(pairs), found.image), CLASSIFICATION["psl"].positive
    )
    aligned = align.supervision(Supervision()).rule
    assert isinstance(aligned, SetLoss)
    rules = {
        "off_focal": CLASSIFICATION["focal"],
        "paper_focal": CLASSIFICATION["focal"],
        "paper_focal_noalpha": SetLoss(
            positive=lambda x, t: align_loss(x, torch.ones_like(t)), negative_weight=1.0
        ),
        "paper_qfl": CLASSIFICATION["qfl"],
        "paper_vfl": CLASSIFICATION["vfl"],
        "off_lwdetr_vfl": SetLoss(iou_target, varifocal_loss),
        "paper_psl": CLASSIFICATION["psl"],
        "off_psl": CLASSIFICATION["psl"],
        "off_lwdetr_psl": scaled,
        "paper_align": aligned,
        "paper_iabce": CLASSIFICATION["ia_bce"],
        "off_lwdetr_iabce": CLASSIFICATION["ia_bce"],
        "off_rfdetr_iabce": replace(CLASSIFICATION["ia_bce"], positive=bce_loss),
    }
    recorded = {k.removesuffix("_loss") for k in a.data if k.endswith("_loss")} - {
        "paper_iou_branch"
    }
    assert recorded <= set(rules)
    for name in recorded:
        logits = a.variable("logits")
        loss = rules[name](one_layer(logits, a["boxes"]), targets, found, a["num_boxes"])["class"][
            0
        ]
        loss.backward()
        assert logits.grad is not None
        exact = name.startswith("paper")
        near(loss, a[f"{name}_loss"], name, rtol=1e-6 if exact else 1e-5, atol=1e-9)
        near(
            logits.grad,
            a[f"{name}_grad"],
            name,
            rtol=1e-6 if exact else 1e-3,
            atol=1e-9 if exact else 2e-6,
        )
    pairs = pair_up(one_layer(a["logits"], a["boxes"]), targets, found)
    near(pairs.iou, a["iou"], "IoU", rtol=1e-6, atol=1e-9)
    near(scaled_iou_target(pairs).target, a["paper_psl_target"], "PSL target", rtol=1e-6, atol=1e-9)
    near(
        align.soft_target(pairs).target,
        a["paper_align_target"],
        "Align target",
        rtol=1e-6,
        atol=1e-9,
    )
    _check_iou_branch(a, targets, found)


def _best_is_one(soft: SoftTarget, image: Tensor) -> SoftTarget:
    """LW-DETR's form of PSL: the IoU itself, scaled both up and down."""
    best = torch.stack([soft.target[image == i].max() for i in image])
    return SoftTarget(soft.target / best)


def _check_iou_branch(a: Arrays, targets: Targets, found: Assignment) -> None:
    judged = a.variable("iou_logits")
    output = one_layer(a["logits"], a["boxes"])._replace(iou_logits=judged.squeeze(-1)[None])
    loss = SetLoss()(output, targets, found, a["num_boxes"])["iou_branch"][0]
    loss.backward()
    assert judged.grad is not None
    near(loss, a["paper_iou_branch_loss"], "IoU branch", rtol=1e-6, atol=1e-9)
    near(judged.grad, a["paper_iou_branch_grad"], "IoU branch", rtol=1e-6, atol=1e-9)
    for kind, key in (("root", "score"), ("product", "score_product")):
        scores = Postprocess(1, iou_branch=kind).scores(output)  # type: ignore[arg-type]
        near(scores, a[f"paper_iou_branch_{key}"], kind, rtol=1e-6, atol=1e-9)
