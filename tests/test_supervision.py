"""The set loss over all layers at once, against one layer and one box at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detrellis.boxes import cxcywh_to_xyxy, pairwise_iou
from detrellis.matching import Hungarian, Known, Match, assign
from detrellis.pairs import giou_target, iou_target, pair_up, scaled_iou_target, sum_by_layer
from detrellis.recipes import find_recipe
from detrellis.recipes.build import build_supervision
from detrellis.set_loss import SetLoss, softmax_set_loss
from detrellis.supervision import Supervision, supervise
from detrellis.types import Assignment, DecoderOutput, Targets

from .test_matching import problem


def naive(
    output: DecoderOutput, targets: Targets, found: Assignment, layer: int, boxes: float
) -> dict[str, Tensor]:
    wanted = torch.zeros_like(output.logits[layer])
    l1 = giou = torch.zeros(())
    for where, image, query, target in zip(*(t.tolist() for t in found[:4]), strict=True):
        if where != layer:
            continue
        wanted[image, query, targets.labels[target]] = 1
        predicted, truth = output.boxes[layer, image, query], targets.boxes[target]
        l1 = l1 + (predicted - truth).abs().sum()
        giou = giou + generalized_box_iou_loss(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(truth))
    focal = sigmoid_focal_loss(output.logits[layer], wanted, alpha=0.25, gamma=2, reduction="sum")
    return {"class": focal / boxes, "box": l1 / boxes, "giou": giou / boxes}


def test_every_layer_equals_the_naive_loss() -> None:
    output, targets = problem(3, (4, 0, 2), 9)
    found = assign([Match(output, targets, Hungarian())])[0]
    terms = SetLoss()(output, targets, found, torch.tensor(6.0))
    for layer in range(3):
        for name, value in naive(output, targets, found, layer, 6.0).items():
            torch.testing.assert_close(terms[name][layer], value, atol=1e-5, rtol=1e-5)


def test_weights_names_and_metrics() -> None:
    output, targets = problem(2, (4, 2), 9)
    supervision = Supervision(weights={"class": 3.0, "box": 0.0, "giou": 1.0})
    losses, _ = supervise(
        [supervision.task("main", output, targets, torch.tensor(6.0), weight=0.5)]
    )
    assert set(losses) == {f"main/{t}/{i}" for t in ("class", "box", "giou") for i in range(2)}
    found = assign([Match(output, targets, Hungarian())])[0]
    plain = SetLoss()(output, targets, found, torch.tensor(6.0))
    torch.testing.assert_close(losses["main/class/1"], plain["class"][1] * 1.5)
    assert losses["main/box/0"] == 0


def test_the_metric_is_the_iou_of_the_last_layers_positives() -> None:
    """Of each task its own, though all are computed together; in as many layers as each has."""
    problems = {"main": problem(3, (4, 0, 2), 9), "proposals": problem(1, (4, 0, 2), 9, seed=1)}
    tasks = [
        Supervision().task(name, *given, torch.tensor(6.0)) for name, given in problems.items()
    ]
    _, metrics = supervise(tasks)
    for name, (output, targets) in problems.items():
        found = assign([Match(output, targets, Hungarian())])[0]
        last = found.layer == len(output.boxes) - 1
        predicted = output.boxes[-1, found.image[last], found.query[last]]
        overlaps = pairwise_iou(
            cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(targets.boxes[found.target[last]])
        ).diag()
        assert len(overlaps) == 6
        torch.testing.assert_close(metrics[f"{name}/iou"], overlaps.mean())


class Comparisons(TorchDispatchMode):
    """Counts the intersections of boxes that are computed within it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.maximum.default
        return func(*args, **(kwargs or {}))


def test_the_boxes_of_all_tasks_are_compared_in_one_pass() -> None:
    """Of those whose rules compare them alike; the losses are those of each task alone."""
    eps = Supervision(rule=SetLoss(iou_eps=0.1))
    tasks = [
        supervision.task(name, *problem(layers, (4, 0, 2), 9, seed=layers), torch.tensor(6.0))
        for name, layers, supervision in (
            ("main", 3, Supervision()),
            ("proposals", 1, Supervision()),
            ("eps", 2, eps),
        )
    ]
    found = assign([task.match for task in tasks])
    with Comparisons() as two:
        losses, _ = supervise(tasks[:2], found[:2])
    with Comparisons() as one:
        alone, _ = supervise(tasks[:1], found[:1])
    assert two.count == one.count == 2  # of the intersections and of the boxes around both
    losses, _ = supervise(tasks, found)
    for task, rows in zip(tasks, found, strict=True):
        alone, _ = supervise([task], [rows])
        assert all(torch.equal(losses[name], value) for name, value in alone.items())


def test_what_positives_should_learn_has_no_gradient() -> None:
    output, targets = problem(2, (4, 2), 9)
    output = output._replace(boxes=output.boxes.clone().requires_grad_())
    pairs = pair_up(output, targets, assign([Match(output, targets, Hungarian())])[0])
    assert not pairs.iou.requires_grad
    assert pairs.giou.requires_grad
    assert all(
        not rule(pairs).target.requires_grad
        for rule in (iou_target, scaled_iou_target, giou_target)
    )


def test_softmax_loss_is_torch_cross_entropy() -> None:
    output, targets = problem(2, (3, 1), 7)
    targets = targets._replace(labels=targets.labels.clamp(max=4))  # the last class is "no object"
    found = assign([Match(output, targets, Hungarian())])[0]
    terms = softmax_set_loss(output, targets, found, torch.tensor(4.0))
    weight = torch.tensor([1.0, 1, 1, 1, 1, 0.1])
    for layer in range(2):
        wanted = torch.full((2, 7), 5)
        own = found.layer == layer
        wanted[found.image[own], found.query[own]] = targets.labels[found.target[own]]
        expected = F.cross_entropy(output.logits[layer].flatten(0, 1), wanted.flatten(), weight)
        torch.testing.assert_close(terms["class"][layer], expected)


def test_one_to_many_counts_copies_as_targets() -> None:
    """The repeated targets' loss over as many boxes:
    the loss of one-to-many without groups (Group DETR, Fig. 1).
    """
    output, targets = problem(2, (2, 1), 9)
    boxes = torch.tensor(3.0)
    several = build_supervision(find_recipe("deformable-detr-r50").override("loss.one_to_many=3"))
    losses, _ = supervise([several.task("main", output, targets, boxes)])
    labels, truth = (t.split(targets.sizes) for t in targets[:2])
    repeated = Targets(
        torch.cat([t.repeat(3) for t in labels]), torch.cat([t.repeat(3, 1) for t in truth]), (6, 3)
    )
    plain = build_supervision(find_recipe("deformable-detr-r50"))
    expected, _ = supervise([plain.task("main", output, repeated, 3 * boxes)])
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_sum_by_layer() -> None:
    layer = torch.tensor([0, 2, 2, 0])
    assert sum_by_layer(torch.tensor([1.0, 2, 3, 4]), layer, 4).tolist() == [5, 0, 5, 0]


def test_losses_are_float32_under_autocast() -> None:
    output, targets = problem(1, (3,), 5)
    half = output.map(Tensor.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = supervise([Supervision().task("main", half, targets, torch.tensor(3.0))])
    assert all(v.dtype == torch.float32 for v in losses.values())
    exact = half.map(Tensor.float)
    expected, _ = supervise([Supervision().task("main", exact, targets, torch.tensor(3.0))])
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name


def test_one_query_may_be_known_for_several_layers_only() -> None:
    output, targets = problem(3, (2,), 4)
    known = Known(Assignment(*(torch.tensor(v) for v in ([1], [0], [3], [1], [0]))))
    losses, _ = supervise([Supervision(known).task("dn", output, targets, torch.tensor(1.0))])
    assert losses["dn/box/0"] == 0
    assert losses["dn/box/1"] > 0
    assert losses["dn/box/2"] == 0
