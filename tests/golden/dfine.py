"""D-FINE: distributions, their losses, and whole models, against the authors' code and transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from detrellis.boxes import boxes_at, side_distances
from detrellis.losses import bins_beside
from detrellis.matching import Hungarian
from detrellis.nn.distribution import Bins, mean_boxes, weighting
from detrellis.pairs import decoupled_distillation, fine_grained_localization, pair_up
from detrellis.supervision import CLASSIFICATION, Supervision, counted, match, supervise, uniting
from detrellis.types import Assignment, DecoderOutput, SideDistributions, Targets

from .align import one_layer, targets_of
from .arrays import Arrays, close

RELATIVE = 1e-6  # the authors' square roots of counts are float32


def close_relative(actual: Tensor, expected: Tensor, what: str) -> None:
    close(actual, expected, RELATIVE * max(1.0, expected.abs().max().item()), what)


def check_bins(values: Tensor, left: Tensor, right_weight: Tensor, left_weight: Tensor, bins: Tensor) -> None:
    """The authors put what lies beyond the last bin a little before it, and give the right bin all weight."""
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
    close(side_distances(a["points"], a["decoded"], bins.scale), a["distances"], 1e-9, "distances of decoded boxes")


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
    """A whole tiny model: its loss as the authors', matched by the union of all that it says."""
    config = a.json("config_json")
    bins = Bins(config["max_num_bins"], config["reg_scale"], config["up"])
    values = weighting(bins, a["weighting"])
    close(values, a["weighting"], 1e-9, "weighting function")
    initial = one_layer(a["pre_logits"], a["pre_boxes"])
    corners = a["all_corners"].unflatten(-1, (4, bins.number + 1))
    base = a["pre_boxes"].expand(len(corners), -1, -1, -1)
    sides = SideDistributions(corners, base, values, bins.scale)
    boxes = a["all_boxes"]
    close(mean_boxes(sides), boxes, 1e-9, "boxes of the distributions")
    output = DecoderOutput(a["all_logits"], boxes, boxes, sides=sides, initial=initial)
    check_criterion(a, output, one_layer(a["enc_topk_logits"], a["enc_topk_boxes"]))


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
    recorded |= {f"layer{i}": (of_layers, i) for i in range(last)} | {"union": (assignments[0], last)}
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


def check_pairs(a: Arrays, targets: Targets, found: Assignment, layer: int, name: str) -> None:
    for image, offset in enumerate(targets.offsets):
        rows = (found.layer == layer) & (found.image == image)
        pairs = torch.stack([found.query[rows], found.target[rows] - offset])
        assert torch.equal(pairs, a[f"match/{name}_b{image}"]), f"matches of {name}"
