"""Checks of whole real-time detectors, tiny, from the pictures to the gradients:
RT-DETR and RT-DETRv2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from detrellis.boxes import inverse_sigmoid
from detrellis.detector import Detector
from detrellis.interop.links import Link, Pair, link_up, missing, to_ours, to_theirs, unused
from detrellis.interop.rtdetr import table
from detrellis.nn.hybrid import HybridNeck
from detrellis.nn.proposals import select
from detrellis.nn.resnet_vd import ResNetVD, Sizes
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.network import build_detector, build_neck
from detrellis.recipes.rtdetr import rtdetr_detector
from detrellis.schemes.cdn import ContrastiveDenoising, Noise
from detrellis.schemes.config import CDNConfig
from detrellis.schemes.denoising import lay_out, positives
from detrellis.set_loss import CLASSIFICATION
from detrellis.supervision import Supervision, supervise
from detrellis.types import DecoderOutput, ImageBatch, Proposals

from ..small import resized
from .arrays import Arrays, close
from .base import check_mask
from .models import own_gradients


def equal(actual: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Equal up to a fraction of the largest entry."""
    scale = max(float(expected.abs().max()), 1e-6)
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=relative * scale, msg=lambda m: f"{what}: {m}"
    )


def network_of(config: dict[str, Any]) -> DetectorConfig:
    """The file's sizes. Its gradients stop between layers."""
    changes: dict[str, Any] = {}
    if "decoder_method" in config:
        discrete = config["decoder_method"] == "discrete"
        changes = {
            "offset_scale": config["decoder_offset_scale"],
            "sampling": "discrete" if discrete else "bilinear",
        }
    return resized(
        rtdetr_detector(50),
        backbone={"pretrained": False},
        width=config["d_model"],
        encoder={
            "layers": config["encoder_layers"],
            "heads": config["encoder_attention_heads"],
            "hidden": config["encoder_ffn_dim"],
            "inner": config["encoder_hidden_dim"],
            "levels": config["num_feature_levels"],
            "expansion": config["hidden_expansion"],
        },
        queries={"count": config["num_queries"], "empty_compete": True},
        cross_attention={"points": config["decoder_n_points"], **changes},
        decoder={
            "layers": config["decoder_layers"],
            "heads": config["decoder_attention_heads"],
            "hidden": config["decoder_ffn_dim"],
            "refine": "detached",
        },
    )


def backbone_of(config: dict[str, Any], strides: tuple[int, ...]) -> ResNetVD:
    """A ResNet-vd of the file's own sizes."""
    bottleneck = config["layer_type"] == "bottleneck"
    sizes = Sizes(
        tuple(config["depths"]), tuple(config["hidden_sizes"]), bottleneck, config["embedding_size"]
    )
    return ResNetVD("of the file", strides, pretrained=None, norm="batch", sizes=sizes)


def load(a: Arrays) -> tuple[Detector, list[Link]]:
    """The file's detector, in double precision."""
    network, backbone = network_of(a.json("config_json")), a.json("config_json")["backbone_config"]
    return loaded(
        a,
        network,
        lambda: backbone_of(backbone, network.backbone.strides),
        table(network, "rt_detr_v2"),
    )


def loaded(
    a: Arrays,
    network: DetectorConfig,
    backbone: Callable[[], Any],
    names: list[Pair],
    left: Collection[str] = (),
) -> tuple[Detector, list[Link]]:
    """A network with the file's weights by its table of `names`, on a backbone of the file's own
    sizes; weights that are `left` belong nowhere."""
    with torch.device("meta"):
        model = build_detector(network, a.json("config_json")["num_labels"])
        model.backbone = backbone()
        model.neck = build_neck(network, model.backbone.channels)
    model = model.to_empty(device="cpu").double().eval()
    links = link_up(model.state_dict(), names, network.decoder.layers)
    assert not missing(model.state_dict(), links)
    weights = a.group("p/")
    assert set(unused(weights, links)) == set(left)
    state = to_ours(weights, links, {k: v.shape for k, v in model.state_dict().items()})
    model.load_state_dict(state, strict=False)  # counters of steps are in neither
    return model, links


def check_rtdetr(a: Arrays) -> None:
    """Every stage of the forward pass, then losses and gradients."""
    model, links = load(a)
    maps = model.backbone(a["pixel_values"])
    for i, found in enumerate(maps):
        if f"feat{i}" in a:
            equal(found, a[f"feat{i}"], 1e-6, f"map {i}")  # recorded in single precision
    assert isinstance(model.neck, HybridNeck)
    check_neck(a, model.neck, maps)
    memory = model.encode(ImageBatch(a["pixel_values"]))
    queries, proposals = model.propose(memory)
    assert proposals is not None
    close(proposals.scores, a["enc_scores_max"], 1e-9, "scores")
    output = model.decoder(queries, memory, (), every_layer=True)
    close(output.logits[-1], a["logits"], 1e-9, "logits")
    close(output.boxes[-1], a["pred_boxes"], 1e-9, "boxes")
    close(proposals.boxes, a["enc_topk_boxes"], 1e-9, "proposals")
    if "all_logits" in a:
        close(output.logits, a["all_logits"], 1e-9, "logits of all layers")
        close(output.boxes, a["all_boxes"], 1e-9, "boxes of all layers")
        close(output.states, a["all_states"], 1e-9, "states of all layers")
        close(
            select(proposals.logits, proposals.best),
            a["enc_topk_logits"],
            1e-9,
            "proposals' logits",
        )
        check_losses(a, model, output, proposals, links)


def check_neck(a: Arrays, neck: HybridNeck, maps: Sequence[Tensor]) -> None:
    """Projected maps, AIFI, the fused levels and the memory, where they are recorded."""
    if "aifi" not in a:
        return
    levels = [project(m) for project, m in zip(neck.projections, maps, strict=True)]
    for i, level in enumerate(levels):
        close(level, a[f"projected{i}"], 1e-9, f"projected map {i}")
    levels[-1] = neck.attend(levels[-1], None)
    close(levels[-1], a["aifi"], 1e-9, "AIFI")
    for i, (fused, out) in enumerate(zip(neck.fuse_levels(levels), neck.outputs, strict=True)):
        close(fused, a[f"hybrid{i}"], 1e-9, f"fused map {i}")
        if f"memory{i}" in a:
            close(out(fused), a[f"memory{i}"], 1e-9, f"memory of level {i}")


def check_losses(
    a: Arrays, model: Detector, output: DecoderOutput, proposals: Proposals, links: list[Link]
) -> None:
    """Each term of each layer, the encoder's too, and all recorded gradients."""
    targets, head = a.targets(), model.queries.head
    assert head is not None
    count = torch.tensor(float(max(len(targets.labels), 1)), dtype=torch.float64)
    supervision = Supervision(rule=CLASSIFICATION["vfl_detached"])
    tasks = [
        supervision.task("main", output, targets, count),
        supervision.proposals().task("proposals", head.training_output(proposals), targets, count),
    ]
    losses, _ = supervise(tasks)
    last = len(output.logits) - 1
    for key, value in losses.items():
        task, term, layer = key.split("/")
        name = {"class": "vfl", "box": "bbox", "giou": "giou"}[term]
        which = last if task == "proposals" else int(layer)
        suffix = "" if task == "main" and which == last else f"_aux_{which}"
        equal(value, a[f"loss/loss_{name}{suffix}"], 1e-9, key)
    total = torch.stack(list(losses.values())).sum()
    equal(total, a["loss_total"], 1e-9, "total")
    total.backward()
    own = own_gradients(model)
    gradients = to_theirs(own, [link for link in links if own.keys() >= set(link.ours)])
    for name, norm in zip(a.data["grad_norm_names"], a["grad_norms"], strict=True):
        if norm >= 0:
            equal(gradients[str(name)].norm(), norm, 1e-6, f"gradient norm of {name}")
    for name, expected in a.group("grad/").items():
        equal(gradients[name], expected, 1e-6, f"gradient of {name}")


def check_cdn(a: Arrays) -> None:
    """Disturbed labels and boxes in their slots, which of them are positives, and who sees whom."""
    params, targets = a.json("params"), a.targets()
    layout = lay_out(targets, a.number("num_groups"), 2)
    assert layout.slots == a.number("pad_size")
    scheme = ContrastiveDenoising(CDNConfig(), 4, params["classes"], params["eps"]).double()
    scheme.label_embed.weight.data = (
        torch.arange(params["classes"] + 1.0).double()[:, None].expand(-1, 4).clone()
    )
    # The file draws for every slot, we for those that are filled.
    where = (layout.image, layout.slot)
    draws = ("draw_label_p", "draw_new_label", "draw_sign01", "draw_box_u")
    p, label, sign, shift = (a[name][where] for name in draws)
    queries = scheme.queries(targets, layout, Noise(p, label.long(), sign * 2 - 1, shift))
    assert queries.boxes is not None
    labels, logits = a["query_label_index"][where], a["query_bbox_unact"][where]
    assert torch.equal(queries.content[where][:, 0].long(), labels.long())
    close(inverse_sigmoid(queries.boxes[where], params["eps"]), logits, 2e-5, "boxes")
    known = positives(layout, 1)
    for b in range(len(targets.sizes)):
        assert torch.equal(known.query[known.image == b], a[f"positive_slots{b}"])
    check_mask(a["blocked"], layout.slots, layout.groups)
