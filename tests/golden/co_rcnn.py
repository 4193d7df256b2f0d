"""Checks of the auxiliary R-CNN of Co-DETR:
its assignment, its proposals' losses, its regions and its own losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detrellis.schemes.collaborative.anchors import NINE, nine_anchors
from detrellis.schemes.collaborative.assigners import BACKGROUND, IGNORED, max_iou
from detrellis.schemes.collaborative.dense import DenseOutput, by_anchor
from detrellis.schemes.collaborative.rcnn import CODER, region_losses
from detrellis.schemes.collaborative.roi import region_features, region_levels
from detrellis.schemes.collaborative.rpn import rpn_losses
from detrellis.schemes.collaborative.scene import Scene

from .arrays import Arrays, close
from .co_dense import levels_of, truths

# positive, negative, minimum, low quality
RULES = {
    "rcnn": (0.5, 0.5, 0.5, False),
    "retina": (0.5, 0.4, 0.0, True),
    "rpn": (0.7, 0.3, 0.3, True),
    "paa": (0.1, 0.1, 0.0, True),
}
REGION_LEVELS = 4  # of Faster R-CNN's pyramid; the map appended to it is the proposals' alone
# Regions to ignore; one anchor for each best IoU
NOT_OFFERED = ("ignore__", "duplicate__retina_not_assign_all__")


def check_max_iou(a: Arrays) -> None:
    for key in (k for k in a.data if k.endswith("__gt_inds") and not k.startswith(NOT_OFFERED)):
        scene, rule, _ = key.split("__")
        positive, negative, minimum, low_quality = RULES[rule]
        anchors = a["proposals" if rule == "rcnn" else "anchors"].float()
        boxes = a[f"{scene}__gt_bboxes"].float().view(-1, 4)
        owner = max_iou(
            anchors,
            boxes,
            positive=positive,
            negative=negative,
            minimum=minimum,
            low_quality=low_quality,
        )
        numbers = torch.where(owner >= 0, owner + 1, torch.where(owner == BACKGROUND, 0, -1))
        assert set(owner[owner < 0].tolist()) <= {BACKGROUND, IGNORED}
        expected = a[key].long()
        compared = torch.ones_like(expected, dtype=torch.bool)
        if low_quality and minimum == 0 and len(boxes):
            # Theirs gives a target that meets no anchor all that no later target takes; ours gives
            # it none.
            lonely = (own_best(anchors, boxes) == 0).nonzero().squeeze(1) + 1
            compared = ~torch.isin(expected, lonely)
            assert not torch.isin(numbers, lonely).any(), key
        assert torch.equal(numbers[compared], expected[compared]), key


def own_best(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Largest overlap in pixels that each of `boxes (T, 4)` has with an anchor: `(T,)`."""
    low = torch.maximum(anchors[:, None, :2], boxes[:, :2])
    high = torch.minimum(anchors[:, None, 2:], boxes[:, 2:])
    return (high - low).clamp(min=0).prod(-1).amax(0)


def check_rpn(a: Arrays) -> None:
    """Where the reference draws at random, this takes the first.
    In float32: overlaps are exactly equal there.
    """
    strides = levels_of(a)
    levels = len(strides)
    for case, labels, boxes in truths(a):
        logits, deltas = (
            [a.variable(f"{n}_lvl{k}") for k in range(levels)] for n in ("cls", "reg")
        )
        scene = Scene(tuple(logits), strides, a["pad_shapes_hw"].float(), labels, boxes)
        output = DenseOutput(by_anchor(logits, NINE), by_anchor(deltas, NINE), None)
        losses = rpn_losses(output, nine_anchors(scene), scene, lambda indices, k: indices[:k])
        close(losses["rpn_class"], a[f"{case}__loss_rpn_cls"], 1e-5, case)
        close(losses["rpn_box"], a[f"{case}__loss_rpn_bbox"], 1e-5, case)
        torch.stack(list(losses.values())).sum().backward()
        for name, maps in (("cls", logits), ("reg", deltas)):
            gradients = torch.stack([m.grad.abs().sum() for m in maps if m.grad is not None])
            close(gradients, a[f"{case}__gradabs_{name}"], 1e-4, f"{case} {name}")


def check_region_losses(a: Arrays) -> None:
    """Without the class-agnostic case: boxes are regressed for each class."""
    classes, case = a.number("num_classes"), "class_specific"
    rois, labels, targets, logits, deltas = (
        a[f"{case}__{k}"] for k in ("rois", "labels", "bbox_targets", "cls_score", "bbox_pred")
    )
    for prefix, rows in (
        ("", torch.arange(len(labels))),
        ("nopos_", (labels == classes).nonzero().squeeze(1)),
    ):
        positive = rows[labels[rows] < classes]
        own = deltas.unflatten(1, (classes, 4))[positive, labels[positive]]
        boxes = CODER.decode(rois[positive, 1:], own)
        losses = region_losses(logits[rows], labels[rows], boxes, targets[positive], len(rows))
        close(losses["class"], a[f"{case}__{prefix}loss_cls"], 1e-5, prefix)
        close(losses["giou"], a[f"{case}__{prefix}loss_bbox"], 1e-5, prefix)


def check_regions(a: Arrays) -> None:
    for case in [k.removesuffix("__finest_scale") for k in a.data if k.endswith("__finest_scale")]:
        strides = a[f"{case}__strides"].tolist()[:REGION_LEVELS]
        assert a.number(f"{case}__finest_scale") == 14 * strides[0]
        levels = region_levels(a[f"{case}__rois"][:, 1:].float(), strides)
        assert torch.equal(levels, a[f"{case}__levels"]), case
    maps = a["align__feat"].float()
    stride = a.number("align__stride")
    rois = a["align__rois"].float()
    image = rois[:, 0].long()
    for cells in [int(k.removeprefix("align__out")) for k in a.data if k.startswith("align__out")]:
        features = region_features([maps], [stride], rois[:, 1:], image, cells)
        close(features.permute(0, 3, 1, 2), a[f"align__out{cells}"], 1e-5, f"{cells} cells")
    pooled = region_features([maps], [stride], rois[:, 1:], image, 7)
    close(pooled.mean((1, 2)), a["align__pooled_mean7"], 1e-5, "mean")
