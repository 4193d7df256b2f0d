"""Checks of the parts of base detectors:
attention, encodings, boxes, losses, post-processing, denoising.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, giou, pairwise_giou, pairwise_iou
from detrellis.matching import (
    Hungarian,
    Known,
    Match,
    MatchingCost,
    assign,
    focal_term,
    softmax_term,
)
from detrellis.nn.deformable import DeformableAttention
from detrellis.nn.kernels.deformable import ms_deform_attn
from detrellis.nn.position import SineMap, sine_embed
from detrellis.postprocess import Postprocess
from detrellis.schemes.cdn import ContrastiveDenoising, Noise, group_count
from detrellis.schemes.config import CDNConfig, DNConfig
from detrellis.schemes.denoising import lay_out, positives
from detrellis.schemes.dn import Denoising
from detrellis.schemes.dn import Noise as PlainNoise
from detrellis.set_loss import SetLoss, softmax_set_loss
from detrellis.supervision import Supervision, supervise
from detrellis.types import DecoderOutput, Memory, Targets

from .arrays import Arrays, close

TERMS = {"class": "ce", "box": "bbox", "giou": "giou"}  # their names of the losses


def check_deformable_attention(a: Arrays) -> None:
    value, locations, weights = (
        a.variable(k) for k in ("value", "sampling_locations", "attention_weights")
    )
    out = ms_deform_attn(value, a.shapes(), locations, weights)
    close(out, a["output"], 1e-9)
    out.backward(a["grad_output"])
    for tensor, name in (
        (value, "value"),
        (locations, "sampling_locations"),
        (weights, "attention_weights"),
    ):
        assert tensor.grad is not None
        close(tensor.grad, a[f"grad_{name}"], 1e-9, name)


def check_deformable_module(a: Arrays) -> None:
    query, value, references = (a.variable(k) for k in ("query", "value", "reference_points"))
    shapes = a.shapes()
    names = {"value_proj": "value_projection", "output_proj": "output_projection"}

    def ours(name: str) -> str:
        layer, kind = name.split(".")
        return f"{names.get(layer, layer)}.{kind}"

    module = DeformableAttention(
        query.shape[-1], a.number("n_heads"), len(shapes), a.number("n_points")
    ).double()
    module.load_state_dict({ours(k): v for k, v in a.group("p/").items()})
    memory = Memory(value, value, shapes, ~a["valid_mask"].bool())
    out = module.attend(query + a["query_pos"], references, memory)
    close(out, a["output"], 1e-9)
    out.backward(a["grad_output"])
    for tensor, name in ((query, "query"), (value, "value"), (references, "reference")):
        assert tensor.grad is not None
        close(tensor.grad, a[f"grad_{name}"], 1e-9, name)
    gradients = {k: p.grad for k, p in module.named_parameters()}
    for name, expected in a.group("grad/").items():
        gradient = gradients[ours(name)]
        assert gradient is not None
        close(gradient, expected, 1e-9, name)


def check_sine(a: Arrays) -> None:
    features = a.number("num_pos_feats")
    valid = a["valid_mask"].double()
    for name in a.data:
        if found := re.fullmatch(r"(?:detr|dab|deformable)_T(\d+)(_half)?", name):
            ours = SineMap(
                2 * features, temperature=float(found[1]), offset=-0.5 if found[2] else 0.0
            )(valid)
            close(ours, a[name].flatten(2).transpose(1, 2), 1e-9, name)
        elif found := re.fullmatch(r"query(\d)d_T(\d+)", name):
            close(
                sine_embed(a[f"pos{found[1]}"], features, temperature=float(found[2])),
                a[name],
                1e-9,
                name,
            )
    close(
        sine_embed(a["proposal_unact"].sigmoid(), features, order="xywh"),
        a["proposal_embed"],
        1e-9,
        "proposals",
    )


def check_giou(a: Arrays) -> None:
    raw = a.variable("boxes1")
    boxes1, boxes2 = cxcywh_to_xyxy(raw), cxcywh_to_xyxy(a["boxes2"])
    close(pairwise_iou(boxes1, boxes2), a["iou"], 1e-9)
    ours = pairwise_giou(boxes1, boxes2)
    close(ours, a["giou"], 1e-9)
    (ours * a["w"]).sum().backward()
    assert raw.grad is not None
    # In an identical pair minimum and maximum are ties, whose gradient is a matter of convention.
    rows = a["iou"].amax(1) < 1
    close(raw.grad[rows], a["grad_boxes1"][rows], 1e-9)
    n = min(len(boxes1), len(boxes2))
    close(giou(boxes1[:n], boxes2[:n]), a["giou"].diagonal()[:n], 1e-9)


def check_set_loss(a: Arrays) -> None:
    params, targets = a.json("params"), a.targets()
    logits, boxes = a.variable("logits"), a.variable("boxes")
    softly = partial(softmax_set_loss, no_object=params["eos_coef"])
    term, rule = (softmax_term, softly) if params["softmax"] else (focal_term, SetLoss())
    cost = MatchingCost(params["cost_class"], params["cost_bbox"], params["cost_giou"], term)
    batch = len(targets.sizes)
    labels, gt = targets.labels.expand(batch, -1), targets.boxes.expand(batch, -1, -1)
    close(term(logits, labels, logits), a["cost_class"], 1e-9, "class cost")
    close(cost(logits, boxes, labels, gt), a["cost_total"], 1e-9, "cost")

    output = DecoderOutput(logits[None], boxes[None], boxes[None])
    found = assign([Match(output, targets, Hungarian(cost))])[0]
    for b in range(batch):
        own = found.image == b
        expected = a[f"match{b}"]
        assert torch.equal(found.query[own], expected[0])
        assert torch.equal(found.target[own] - targets.offsets[b], expected[1])

    weights = {ours: params["weights"][f"loss_{key}"] for ours, key in TERMS.items()}
    supervision = Supervision(Hungarian(cost), rule, weights)
    losses, _ = supervise(
        [supervision.task("main", output, targets, torch.tensor(float(a.number("num_boxes"))))]
    )
    for name, key in TERMS.items():
        close(losses[f"main/{name}/0"] / weights[name], a[f"loss_{key}"], 1e-9, name)
    _check_gradients(sum(losses.values()), a["loss_total"], logits, boxes, a)  # type: ignore[arg-type]


def _check_gradients(
    total: Tensor, expected: Tensor, logits: Tensor, boxes: Tensor, a: Arrays
) -> None:
    close(total, expected, 1e-9, "total")
    total.backward()
    assert logits.grad is not None
    close(logits.grad, a["grad_logits"], 1e-9, "gradient of the logits")
    close(
        boxes.grad if boxes.grad is not None else torch.zeros_like(boxes),
        a["grad_boxes"],
        1e-9,
        "of the boxes",
    )


def check_postprocess(a: Arrays) -> None:
    sizes = a["target_sizes_hw"]
    logits, boxes = a["logits"][None], a["boxes"][None]
    output = DecoderOutput(logits, boxes, boxes)
    for b, found in enumerate(Postprocess(a.number("k"))(output, sizes)):
        close(found.scores, a["scores"][b], 1e-9)
        assert torch.equal(found.labels, a["labels"][b])
        close(found.boxes, a["boxes_xyxy"][b], 1e-9)
    for b, found in enumerate(Postprocess(output.logits.shape[2], softmax=True)(output, sizes)):
        # The file's are in the queries' order
        scores, order = a["softmax_scores"][b].sort(descending=True)
        close(found.scores, scores, 1e-9)
        assert torch.equal(found.labels, a["softmax_labels"][b][order])


def recorded_noise(a: Arrays, flip: float) -> Noise:
    """The file's draws; it holds new labels for the flipped rows only."""
    if "draw_label_p" not in a:
        return Noise(
            torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0, 4)
        )
    p = a["draw_label_p"]
    labels = torch.zeros(len(p), dtype=torch.int64)
    labels[p < flip] = a["draw_new_label"]
    return Noise(p, labels, a["draw_sign01"] * 2 - 1, a["draw_box_u"])


def check_cdn(a: Arrays) -> None:
    params, targets = a.json("params"), a.targets()
    config = CDNConfig(
        number=params["dn_number"],
        label_noise=params["label_noise_ratio"],
        box_noise=params["box_noise_scale"],
    )
    network = (params["hidden"], params["num_classes"], params["inverse_sigmoid_eps"])
    scheme = ContrastiveDenoising(config, *network).double()
    scheme.label_embed.load_state_dict({"weight": a["label_embed"]})
    layout = lay_out(targets, group_count(params["dn_number"], max(targets.sizes)), 2)
    assert (layout.slots, layout.groups) == (a.number("pad_size"), a.number("num_dn_group"))
    queries = scheme.queries(targets, layout, recorded_noise(a, params["label_noise_ratio"] / 2))
    assert queries.boxes is not None
    assert torch.equal(queries.content, a["query_label"])
    close(torch.logit(queries.boxes), a["query_bbox_unact"], 2e-4)

    known = positives(layout, 1)
    for b, offset in enumerate(targets.offsets):
        own = known.image == b
        assert torch.equal(known.query[own], a[f"pos_query_idx{b}"])
        assert torch.equal(known.target[own] - offset, a[f"pos_gt_idx{b}"])
        negatives = layout.slot[~layout.positive & (layout.image == b)]
        assert torch.equal(negatives, a[f"neg_query_idx{b}"])
    check_mask(a["attn_mask"], layout.slots, layout.groups)


def check_dn(a: Arrays) -> None:
    params, targets = a.json("params"), a.targets()
    # The file draws labels over one row more than classes: to us that is another class.
    config = DNConfig(
        groups=params["groups"],
        label_noise=params["label_noise_prob"],
        box_noise=params["box_noise_scale"],
    )
    network = (params["hidden"], params["label_draw_high"], params["inverse_sigmoid_eps"])
    scheme = Denoising(config, *network).double()
    scheme.label_embed.load_state_dict({"weight": a["label_embed"][: params["label_draw_high"]]})
    layout = lay_out(targets, config.groups, 1)
    assert (layout.slots, layout.groups) == (
        a.number("single_pad") * a.number("groups"),
        a.number("groups"),
    )
    labels = torch.zeros(len(layout.slot), dtype=torch.int64)
    labels[a["draw_label_p"] < config.label_noise] = a["draw_new_label"]
    queries = scheme.queries(
        targets, layout, PlainNoise(a["draw_label_p"], labels, 2 * a["draw_box_u"] - 1)
    )
    assert queries.boxes is not None
    close(queries.content, a["query_label"], 1e-7)
    close(torch.logit(queries.boxes), a["query_bbox_unact"], 2e-4)
    check_mask(a["attn_mask"], layout.slots, layout.groups)


def check_mask(blocked: Tensor, slots: int, groups: int) -> None:
    """The file's mask says what our segments say:
    a group sees itself and the main queries, which see no group.
    """
    group = torch.arange(slots) // max(slots // groups, 1)
    expected = torch.zeros_like(blocked)
    expected[:slots, :slots] = group[:, None] != group
    expected[slots:, :slots] = True
    assert torch.equal(blocked, expected)


def check_denoising_loss(a: Arrays) -> None:
    targets: Targets = a.targets()
    logits, boxes = a.variable("logits"), a.variable("boxes")
    contrastive = "contrastive" not in a or bool(a.data["contrastive"])
    layout = lay_out(targets, a.number("groups"), 2 if contrastive else 1)
    known = positives(layout, 1)
    for b, offset in enumerate(targets.offsets):
        own = known.image == b
        assert torch.equal(known.query[own], a[f"pos_query_idx{b}"])
        assert torch.equal(known.target[own] - offset, a[f"pos_gt_idx{b}"])
    output = DecoderOutput(logits[None], boxes[None], boxes[None])
    normaliser = torch.tensor(float(a.number("normaliser")))
    losses, _ = supervise([Supervision(Known(known)).task("cdn", output, targets, normaliser)])
    close(losses["cdn/class/0"], a["loss_ce"], 1e-9)
    close(losses["cdn/box/0"] / 5, a["loss_bbox"], 1e-9)
    close(losses["cdn/giou/0"] / 2, a["loss_giou"], 1e-9)
    _check_gradients(sum(losses.values()), a["total_w1_5_2"], logits, boxes, a)  # type: ignore[arg-type]
