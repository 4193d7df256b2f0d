"""D-FINE: distributions, their losses, and whole models,
against the authors' code and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import FeatureListNet
from timm.models.hgnet import HighPerfGpuNet
from torch import Tensor, nn

from detrellis.boxes import boxes_at, side_distances
from detrellis.detector import Detector
from detrellis.interop.dfine_names import table
from detrellis.interop.links import Link, to_theirs
from detrellis.losses import bins_beside
from detrellis.matching import Hungarian
from detrellis.nn.distribution import Bins, weighting
from detrellis.nn.hybrid import HybridNeck
from detrellis.pairs import decoupled_distillation, fine_grained_localization, pair_up
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.dfine import dfine_detector
from detrellis.set_loss import CLASSIFICATION
from detrellis.supervision import Supervision, counted, match, supervise, uniting
from detrellis.types import Assignment, DecoderOutput, ImageBatch, SideDistributions, Targets

from ..small import resized
from .align import one_layer, targets_of
from .arrays import Arrays, close
from .models import own_gradients
from .realtime import check_neck, loaded

RELATIVE = 1e-6  # the authors' square roots of counts are float32


def close_relative(actual: Tensor, expected: Tensor, what: str) -> None:
    close(actual, expected, RELATIVE * max(1.0, expected.abs().max().item()), what)


def check_bins(
    values: Tensor, left: Tensor, right_weight: Tensor, left_weight: Tensor, bins: Tensor
) -> None:
    """The authors put what lies beyond the last bin a little before it,
    and give the right bin all weight.
    """
    found, nearness = bins_beside(values, bins)
    assert torch.equal(found, left.long())
    close(nearness, right_weight, 1e-9, "weight of the right bin")
    close(1 - nearness, left_weight, 1e-9, "weight of the left bin")


def check_fdr(a: Arrays) -> None:
    """The weighting function, decoding, and where targets lie between the bins."""
    params = a.json("params")
    bins = Bins(params["bins"], params["reg_scale"], params["up"])
    values = weighting(bins, a["points"])
    close(values, a["weighting"], 1e-9, "weighting function")
    distances = side_distances(a["points"], a["gt_boxes"], bins.scale)
    check_bins(distances, a["bin"], a["weight_right"], a["weight_left"], values)
    close(boxes_at(a["points"], a["distances"], bins.scale), a["decoded"], 1e-9, "decoded boxes")
    close(
        side_distances(a["points"], a["decoded"], bins.scale),
        a["distances"],
        1e-9,
        "distances of decoded boxes",
    )


def check_losses(a: Arrays) -> None:
    """FGL and DDF with their gradients, on a given matching."""
    bins, targets = Bins(), targets_of(a)
    values = weighting(bins, a["W"])
    close(values, a["W"], 1e-9, "weighting function")
    close(boxes_at(a["ref"], a["distance"], bins.scale), a["decoded"], 1e-9, "decoded boxes")
    distances = side_distances(a["ref"], a["target"], bins.scale).flatten()
    check_bins(distances, a["left_bin"], a["weight_right"], a["weight_left"], values)

    logits, teacher = a.variable("pred_corners"), a["teacher_corners"]
    shape = (*logits.shape[:2], 4, bins.number + 1)
    positives = pairs_of(a, targets)

    def gradient(loss: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(loss, logits)
        return found

    sides = SideDistributions(logits.view(1, *shape), a["ref_points"][None], values, bins.scale)
    pairs = pair_up(one_layer(a["logits"], a["boxes"]), targets, positives)
    loss = fine_grained_localization(pairs, sides, a["num_boxes"])[0]
    close_relative(loss, a["loss_fgl"], "FGL")
    close_relative(gradient(loss), a["grad_fgl"], "gradient of FGL")

    sides = sides._replace(logits=torch.stack([logits.view(shape), teacher.view(shape)]))
    scores = torch.stack([a["logits"], a["teacher_logits"]])
    loss = decoupled_distillation(pairs._replace(layers=2), sides, scores)[0]
    close_relative(loss, a["loss_ddf"], "DDF")
    close_relative(gradient(loss), a["grad_ddf"], "gradient of DDF")


def pairs_of(a: Arrays, targets: Targets) -> Assignment:
    image, query = a["match_img"], a["match_query"]
    target = torch.tensor(targets.offsets)[image] + a["match_gt"]
    return Assignment(torch.zeros_like(image), image, query, target, torch.arange(len(image)))


def check_model(a: Arrays) -> None:
    """A whole tiny model from the pictures to the gradients;
    its loss is the authors', with the union of matches.
    """
    model, links = load(a)
    maps = model.backbone(a["pixel_values"])
    for i, found in enumerate(maps):
        close_relative(found, a[f"feat{i}"], f"map {i}")  # recorded in single precision
    assert isinstance(model.neck, HybridNeck)
    check_neck(a, model.neck, maps)
    memory = model.encode(ImageBatch(a["pixel_values"]))
    queries, proposals = model.propose(memory)
    assert proposals is not None
    output = model.decoder(queries, memory, (), every_layer=True)
    assert output.initial is not None
    assert output.sides is not None
    close(output.sides.bins, a["weighting"], 1e-9, "weighting function")
    close(output.initial.logits[0], a["pre_logits"], 1e-9, "logits before there are distributions")
    close(output.initial.boxes[0], a["pre_boxes"], 1e-9, "boxes before there are distributions")
    close(output.sides.logits.flatten(-2), a["all_corners"], 1e-9, "distributions")
    close(output.boxes, a["all_boxes"], 1e-9, "boxes of all layers")
    close(output.logits, a["all_logits"], 1e-9, "logits of all layers")
    close(model(ImageBatch(a["pixel_values"])).boxes[0], a["pred_boxes"], 1e-9, "boxes")
    check_criterion(a, output, model.queries.training_output(proposals)).backward()
    check_gradients(a, model, links)


def load(a: Arrays) -> tuple[Detector, list[Link]]:
    """The file's detector, in double precision."""
    network, backbone = network_of(a.json("config_json")), a.json("config_json")["backbone_config"]
    left = {"model.decoder.up", "model.decoder.reg_scale"}
    return loaded(
        a, network, lambda: hgnet(backbone, network.backbone.strides), table(network), left
    )


def network_of(config: dict[str, Any]) -> DetectorConfig:
    """The file's sizes."""
    return resized(
        dfine_detector("l"),
        backbone={"pretrained": False, "strides": tuple(config["feat_strides"])},
        width=config["d_model"],
        encoder={
            "layers": config["encoder_layers"],
            "heads": config["encoder_attention_heads"],
            "hidden": config["encoder_ffn_dim"],
            "inner": config["encoder_hidden_dim"],
            "levels": config["num_feature_levels"],
            "blocks": round(3 * config["depth_mult"]),
            "expansion": config["hidden_expansion"],
        },
        queries={"count": config["num_queries"]},
        cross_attention={"points": config["decoder_n_points"]},
        decoder={
            "layers": config["decoder_layers"],
            "heads": config["decoder_attention_heads"],
            "hidden": config["decoder_ffn_dim"],
            "distributions": {
                "bins": config["max_num_bins"],
                "scale": config["reg_scale"],
                "reach": config["up"],
            },
        },
    )


class Backbone(nn.Module):
    """timm's HGNetV2 of other sizes than any that it has a name for."""

    def __init__(self, model: nn.Module, channels: list[int]) -> None:
        super().__init__()
        self.model, self.channels = model, channels

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.model(pixels)
        return maps


def hgnet(config: dict[str, Any], strides: tuple[int, ...]) -> Backbone:
    """A HGNetV2 of the file's own sizes."""
    stages = zip(*(config[f"stage_{name}"] for name in STAGE), strict=True)
    sizes = {f"stage{i + 1}": stage for i, stage in enumerate(stages)}
    whole = HighPerfGpuNet(
        {"stem_type": "v2", "stem_chs": config["stem_channels"][1:], **sizes},
        use_lab=config["use_learnable_affine_block"],
    )
    wanted = [stride.bit_length() - 3 for stride in strides]
    return Backbone(
        FeatureListNet(whole, out_indices=wanted, flatten_sequential=True),
        [config["stage_out_channels"][i] for i in wanted],
    )


STAGE = (
    *("in_channels", "mid_channels", "out_channels", "num_blocks"),
    *("downsample", "light_block", "kernel_size", "numb_of_layers"),
)


TERMS = {"class": "vfl", "box": "bbox", "giou": "giou", "fgl": "fgl", "ddf": "ddf"}


def check_criterion(a: Arrays, output: DecoderOutput, proposals: DecoderOutput) -> Tensor:
    """The matches of every output and their union, and all losses; the sum of the losses."""
    targets, layers = a.targets(), len(output.boxes)
    supervision = Supervision(Hungarian(union=True), CLASSIFICATION["vfl_detached"])
    count = torch.tensor(float(len(targets.labels)))
    assert output.initial is not None
    parts = [
        supervision.task("main", output, targets, count),
        supervision.initial(layers).task("initial", output.initial, targets, count),
        supervision.proposals().task("proposals", proposals, targets, count),
    ]
    tasks = uniting(parts)
    assignments = match(tasks)
    of_layers, of_initial, of_proposals = assignments[len(parts) :]
    last = layers - 1
    recorded = {"last": (of_layers, last), "pre": (of_initial, 0), "encoder": (of_proposals, 0)}
    recorded |= {f"layer{i}": (of_layers, i) for i in range(last)} | {
        "union": (assignments[0], last)
    }
    for name, (found, layer) in recorded.items():
        check_pairs(a, targets, found, layer, name)

    losses, _ = supervise(counted(tasks, assignments, lambda counts: counts), assignments)
    suffixes = {"initial": "_pre", "proposals": "_enc_0"}
    names = {}
    for key in losses:
        task, term, layer = key.split("/")
        suffix = suffixes.get(task, "" if int(layer) == last else f"_aux_{layer}")
        names[f"loss/loss_{TERMS[term]}{suffix}"] = key
    assert names.keys() == {key for key in a.data if key.startswith("loss/")}
    for name, key in names.items():
        close_relative(losses[key], a[name], name)
    total = torch.stack(list(losses.values())).sum()
    close_relative(total, a["loss_total"], "sum of the losses")
    return total


def check_gradients(a: Arrays, model: Detector, links: list[Link]) -> None:
    own = own_gradients(model)
    gradients = to_theirs(own, [link for link in links if own.keys() >= set(link.ours)])
    for name, norm in zip(a.data["grad_norm_names"], a["grad_norms"], strict=True):
        if norm >= 0:
            close_relative(gradients[str(name)].norm(), norm, f"gradient norm of {name}")
    for name, expected in a.group("grad/").items():
        close_relative(gradients[name], expected, f"gradient of {name}")


def check_pairs(a: Arrays, targets: Targets, found: Assignment, layer: int, name: str) -> None:
    for image, offset in enumerate(targets.offsets):
        rows = (found.layer == layer) & (found.image == image)
        pairs = torch.stack([found.query[rows], found.target[rows] - offset])
        assert torch.equal(pairs, a[f"match/{name}_b{image}"]), f"matches of {name}"
