"""Losses of real-time detectors and of rivals of the four papers, against the authors' codes."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from detrellis.boxes import xyxy_to_cxcywh
from detrellis.matching import Dynamic
from detrellis.nn.relation import PositionRelation, box_relation
from detrellis.nn.spatial import cells_within
from detrellis.salience import salience_targets
from detrellis.schemes.rank import GIOU_AWARE, HighOrderCost
from detrellis.set_loss import CLASSIFICATION, SetLoss, matchability_aware_loss
from detrellis.types import Assignment, Memory, Targets

from .align import one_layer, targets_of
from .arrays import Arrays


def near(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9, msg=lambda m: f"{what}: {m}")


def pairs_of(image: Tensor, query: Tensor, target: Tensor) -> Assignment:
    """Positives of one layer, each alone with its target."""
    return Assignment(torch.zeros_like(image), image, query, target, torch.arange(len(image)))


def loss_and_gradient(
    a: Arrays, rule: SetLoss, targets: Targets, positives: Assignment, normaliser: Tensor
) -> tuple[Tensor, Tensor]:
    """The class loss of one layer, and its gradient with respect to the logits."""
    logits = a.variable("logits")
    value = rule(one_layer(logits, a["boxes"]), targets, positives, normaliser)["class"][0]
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def check_mal(a: Arrays) -> None:
    """DEIM's loss."""
    targets, image, gamma = targets_of(a), a["match_img"], float(a["gamma"])
    target = torch.tensor(targets.offsets)[image] + a["match_gt"]
    rule = CLASSIFICATION["mal"] if gamma == 1.5 else matchability_aware_loss(gamma)
    positives = pairs_of(image, a["match_query"], target)
    loss, gradient = loss_and_gradient(a, rule, targets, positives, a["num_boxes"])
    near(loss, a["loss"], "loss")
    near(gradient, a["grad"], "gradient")


def check_rank(a: Arrays) -> None:
    """Rank-DETR's loss, and its cost late in a run."""
    targets, image = targets_of(a), a["match_img"]
    target = torch.tensor(targets.offsets)[image] + a["match_gt"]
    positives = pairs_of(image, a["match_query"], target)
    loss, gradient = loss_and_gradient(a, GIOU_AWARE, targets, positives, a["num_boxes"])
    near(loss, a["loss"], "loss")
    near(gradient, a["grad"], "gradient")
    starts = (*targets.offsets, len(targets.labels))
    for b, (logits, boxes) in enumerate(zip(a["logits"], a["boxes"], strict=True)):
        rows = slice(starts[b], starts[b + 1])
        cost = HighOrderCost()(logits, boxes, targets.labels[rows], targets.boxes[rows])
        near(cost, a[f"high_order_cost{b}"], f"cost of image {b}")


def check_class_losses(a: Arrays) -> None:
    """VFL as real-time DETRs have it, IA-BCE,
    and MAL with several exponents and weights, on one matching.
    """
    targets = a.targets()
    matches = [a[f"match{b}"] for b in range(len(targets.sizes))]
    image = torch.cat([torch.full((match.shape[1],), b) for b, match in enumerate(matches)])
    query = torch.cat([match[0] for match in matches])
    target = torch.cat(
        [match[1] + offset for match, offset in zip(matches, targets.offsets, strict=False)]
    )
    names = [key.removeprefix("grad_logits/") for key in a.data if key.startswith("grad_logits/")]
    assert names
    for name in names:
        rule = CLASSIFICATION.get({"vfl": "vfl_detached"}.get(name, name))
        if rule is None:
            found = re.fullmatch(r"mal_gamma([\d.]+)_alpha(None|[\d.]+)", name)
            assert found, f"no class loss is called {name}"
            weight = 1.0 if found[2] == "None" else float(found[2])
            rule = matchability_aware_loss(float(found[1]), weight)
        loss, gradient = loss_and_gradient(
            a, rule, targets, pairs_of(image, query, target), a["normaliser"]
        )
        near(loss, a[name], name)
        near(gradient, a[f"grad_logits/{name}"], f"gradient of {name}")


def check_dynamic(a: Arrays) -> None:
    """The one-to-many rule of MS-DETR and DAC-DETR: scores, and the pairs at two settings."""
    targets = targets_of(a)
    starts = (*targets.offsets, len(targets.labels))
    settings = {
        f"k{k}": float(at)
        for k, at in re.findall(r"k(\d+): threshold ([\d.]+)", str(a.data["settings"]))
    }
    assert settings
    for b, (logits, boxes) in enumerate(zip(a["logits"], a["boxes"], strict=True)):
        rows = slice(starts[b], starts[b + 1])
        for name, threshold in settings.items():
            rule = Dynamic(np.arange, k=int(name[1:]), threshold=threshold)
            cost = rule.cost(logits, boxes, targets.labels[rows], targets.boxes[rows])
            near(-cost.T, a[f"score{b}"], f"scores of image {b}")
            pairs = np.stack(rule.solve(cost.numpy(), 0, 1))
            order = (-cost.numpy())[pairs[0], pairs[1]].argsort()
            assert (pairs[:, order] == a[f"{name}_pairs{b}"].numpy()).all(), (name, b)


def check_relation(a: Arrays) -> None:
    """Relation-DETR's encoding of pairs of boxes, and the bias made of it."""
    near(box_relation(a["source"], a["target"]), a["encoding"], "encoding")
    heads, features = a["weight"].shape
    relation = PositionRelation(heads).double()
    assert relation.projection.in_features == features
    relation.projection.load_state_dict({"weight": a["weight"], "bias": a["bias"]})
    near(relation(a["source"], a["target"]).detach(), a["out"], "bias")


def check_box_attention(a: Arrays) -> None:
    """Cascade-DETR's cells that a query may not read, of images with padding."""
    shapes = tuple((int(h), int(w)) for h, w in a["shapes"])
    boxes, cells = a["references"], sum(h * w for h, w in shapes)
    ratios = (a["valid"] / a["shapes"]).flip(-1)  # (B, V, 2) of width and height
    tokens = boxes.new_zeros(len(boxes), cells, 1)
    found = cells_within(boxes, Memory(tokens, tokens, shapes, valid_ratios=ratios)).split(
        [h * w for h, w in shapes], 2
    )
    for level, readable in enumerate(found):
        assert torch.equal(~readable, a[f"blocked{level}"]), f"level {level}"


def check_salience(a: Arrays) -> None:
    """Salience-DETR's targets of one image, on as many levels as there are."""
    size = a["image"].double()
    corners = a["gt_boxes"]
    levels = len([key for key in a.data if key.startswith("level")])
    shapes = tuple((a[f"level{i}"].shape[0], a[f"level{i}"].shape[1]) for i in range(levels))
    tokens = corners.new_zeros(1, sum(h * w for h, w in shapes), 1)
    boxes = xyxy_to_cxcywh(corners) / size.flip(0).repeat(2)
    targets = Targets(torch.zeros(len(boxes), dtype=torch.long), boxes, (len(boxes),))
    found = salience_targets(Memory(tokens, tokens, shapes), targets, size[None])
    near(found[0], torch.cat([a[f"level{i}"].flatten() for i in range(levels)]), "targets")
