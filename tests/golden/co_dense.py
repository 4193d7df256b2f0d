"""Checks of Co-DETR's dense heads: anchors, box coders, assignment, and the losses of each head.

In float32 as the references ran: exact ties between IoUs decide assignments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from detrellis.boxes import giou, iou
from detrellis.losses import (
    distribution_focal_loss,
    focal_negative,
    focal_positive,
    l1_loss,
    quality_focal_loss,
)
from detrellis.schemes.collaborative import assigners
from detrellis.schemes.collaborative.anchors import (
    RATIOS,
    SCALES,
    grid_anchors,
    grid_points,
    nine_anchors,
    square_anchors,
    usable_cells,
)
from detrellis.schemes.collaborative.assigners import IGNORED
from detrellis.schemes.collaborative.atss import ATSS
from detrellis.schemes.collaborative.coder import Deltas, centerness, clip, from_sides, sides
from detrellis.schemes.collaborative.dense import (
    DenseOutput,
    assign_usable,
    by_anchor,
    focal_sum,
    gather_positives,
    mean_positives,
)
from detrellis.schemes.collaborative.fcos import FCOS
from detrellis.schemes.collaborative.gfl import FARTHEST, GFL
from detrellis.schemes.collaborative.paa import PAA, candidate_loss, keep_likely, overlapping
from detrellis.schemes.collaborative.retinanet import RetinaNet, assign
from detrellis.schemes.collaborative.scene import Scene

from .arrays import Arrays

CASES = {"two": None, "one_empty": 1, "all_empty": 0}  # how many images have targets; None: all
NAMES = {"class": "cls", "giou": "bbox"}  # of losses, where they differ
Maps = dict[str, list[Tensor]]


def near(
    actual: Tensor, expected: Tensor, what: str, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    torch.testing.assert_close(
        actual.detach().double(),
        expected.double(),
        rtol=rtol,
        atol=atol,
        msg=lambda m: f"{what}: {m}",
    )


def near_gradient(
    losses: dict[str, Tensor] | Tensor, maps: dict[str, list[Tensor]], a: Arrays, case: str
) -> None:
    """Sums of absolute gradients by level; frees the graph."""
    total = losses if isinstance(losses, Tensor) else torch.stack(list(losses.values())).sum()
    flat = [m for levels in maps.values() for m in levels]
    for m in flat:
        m.grad = None
    total.backward()
    for name, levels in maps.items():
        found = torch.stack(
            [torch.zeros(()) if m.grad is None else m.grad.abs().sum() for m in levels]
        )
        near(
            found, a[f"{case}__gradabs_{name}"], f"{case}, gradient of {name}", rtol=1e-3, atol=1e-4
        )


def levels_of(a: Arrays) -> tuple[int, ...]:
    """The strides of the file's levels."""
    return tuple(int(stride) for stride in a["strides"])


def strides_at(points: Tensor, counts: Sequence[int]) -> tuple[int, ...]:
    """The strides of levels with so many points,
    the first of which lies half a stride from the corner.
    """
    return tuple(int(2 * own[0, 0]) for own in points.split(list(counts)))


def scenes(a: Arrays, *, whole: bool = False) -> Iterator[tuple[str, Scene]]:
    """Each case as branches see it; `whole`: as if nothing were padding."""
    shapes, strides = a.shapes("featsizes"), levels_of(a)
    sizes = a["pad_shapes_hw"].float()
    if whole:
        sizes = (torch.tensor(shapes[0]) * strides[0]).expand_as(sizes).to(sizes)
    maps = tuple(torch.zeros(len(sizes), 1, *shape) for shape in shapes)
    for case, labels, boxes in truths(a):
        yield case, Scene(maps, strides, sizes, labels, boxes)


def truths(a: Arrays) -> Iterator[tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Each case with the labels and boxes of its images."""
    images = range(len(a["pad_shapes_hw"]))
    for case, some in CASES.items():
        counts = [len(a[f"lab{i}"]) if some is None or i < some else 0 for i in images]
        labels = tuple(a[f"lab{i}"][:n] for i, n in enumerate(counts))
        yield case, labels, tuple(a[f"gt{i}"][:n].float().view(-1, 4) for i, n in enumerate(counts))


def read(a: Arrays, quality: str | None, anchors: int = 1) -> tuple[Maps, DenseOutput]:
    """A head's output by name and level, and as its losses read it."""
    names = ["cls", "reg"] + ([quality] if quality else [])
    maps = {
        name: [a[f"{name}_lvl{i}"].float().requires_grad_() for i in range(len(levels_of(a)))]
        for name in names
    }
    third = by_anchor(maps[quality], anchors).squeeze(-1) if quality else None
    return maps, DenseOutput(
        by_anchor(maps["cls"], anchors), by_anchor(maps["reg"], anchors), third
    )


def near_gradients(total: Tensor, maps: Maps, a: Arrays, case: str) -> None:
    """The sums of absolute gradients with respect to each level's outputs."""
    for name, levels in maps.items():
        gradients = torch.autograd.grad(total, levels, retain_graph=True)
        found = torch.stack([g.abs().sum() for g in gradients])
        near(
            found, a[f"{case}__gradabs_{name}"], f"{case}, gradient of {name}", rtol=1e-3, atol=1e-4
        )


def by_level(owners: Tensor, scene: Scene) -> Iterator[Tensor]:
    """Owners `(B, A)` for each level, with all other levels ignored."""
    cells = [h * w for h, w in scene.shapes]
    counts = torch.tensor(cells) * (owners.shape[1] // sum(cells))
    level = torch.arange(len(cells)).repeat_interleave(counts)
    for i in range(len(cells)):
        yield torch.where(level == i, owners, IGNORED)


def near_class_levels(
    output: DenseOutput, scene: Scene, owners: Tensor, a: Arrays, case: str
) -> None:
    """The focal loss of each level."""
    count = mean_positives(gather_positives(scene, owners))
    levels = [
        focal_sum(output.logits, own, gather_positives(scene, own)) / count
        for own in by_level(owners, scene)
    ]
    near(torch.stack(levels), a[f"{case}__loss_cls_per_level"], f"{case}, class by level")


def check_head(
    a: Arrays, branch: type[ATSS | RetinaNet | FCOS | GFL | PAA], quality: str | None = None
) -> None:
    """Losses and gradients. The reference's FCOS learns from padding too, ours not:
    here nothing is padding.
    """
    head = branch(32, a.number("num_classes"), len(levels_of(a)))
    for case, scene in scenes(a, whole=branch is FCOS):
        maps, output = read(a, quality, head.head.anchors)
        losses, _, owners = head.supervise(output, scene)
        for name, loss in losses.items():
            near(loss, a[f"{case}__loss_{NAMES.get(name, name)}"], f"{case}, {name}")
        near_gradients(torch.stack(list(losses.values())).sum(), maps, a, case)
        if branch in (ATSS, RetinaNet):
            near_class_levels(output, scene, owners, a, case)


def check_atss(a: Arrays) -> None:
    """The head, and what each anchor should learn."""
    check_head(a, ATSS, "ctr")
    _, scene = next(scenes(a))
    owners = assign_usable(scene, square_anchors(scene), assigners.atss)
    found = gather_positives(scene, owners)
    labels = torch.full_like(owners, a.number("num_classes"))
    labels[found.image, found.anchor] = found.label
    targets = torch.zeros(*owners.shape, 4)
    targets[found.image, found.anchor] = found.box
    assert torch.equal(labels, a["two__labels"].long())
    assert torch.equal((owners != IGNORED).double(), a["two__label_weights"])
    near(targets, a["two__bbox_targets"], "targets")
    near(mean_positives(found), a["two__avg_factor"], "normaliser")


def check_retina_l1(a: Arrays) -> None:
    """RetinaNet with L1 on deltas, which we do not offer:
    its classes, and the deltas that it would learn.
    """
    coder = Deltas()
    for case, scene in scenes(a):
        maps, output = read(a, None, 9)
        anchors = nine_anchors(scene)
        owners = assign_usable(scene, anchors, assign)
        found = gather_positives(scene, owners)
        wrong = l1_loss(
            output.regression[found.image, found.anchor],
            coder.encode(anchors[found.anchor], found.box),
        )
        losses = torch.stack(
            [focal_sum(output.logits, owners, found), wrong.sum()]
        ) / mean_positives(found)
        near(losses, torch.stack([a[f"{case}__loss_cls"], a[f"{case}__loss_bbox"]]), case)
        near_gradients(losses.sum(), maps, a, case)
        near_class_levels(output, scene, owners, a, case)
        of_level = [
            wrong[own[found.image, found.anchor] >= 0].sum() for own in by_level(owners, scene)
        ]
        near(
            torch.stack(of_level) / mean_positives(found),
            a[f"{case}__loss_bbox_per_level"],
            f"{case}, boxes by level",
        )


def check_paa(a: Arrays) -> None:
    """The head; the candidates of either image with their losses, and which of them stay."""
    check_head(a, PAA, "iou")
    _, scene = next(scenes(a))
    _, output = read(a, "iou")
    anchors = square_anchors(scene)
    before = assign_usable(scene, anchors, overlapping)
    after = keep_likely(output, scene, anchors, before)
    found = gather_positives(scene, before)
    loss, first = candidate_loss(output, anchors, found), 0
    for i, labels in enumerate(scene.labels):
        key, own = f"two__img{i}__", found.image == i
        assert torch.equal(found.anchor[own], a[f"{key}cand_inds"])
        assert torch.equal(found.target[own] - first, a[f"{key}cand_gt"])
        near(loss[own], a[f"{key}cand_losses"], f"{key}candidates")
        first += len(labels)
        # Ignored and background are the last rows
        others = labels.new_full((2,), a.number("num_classes"))
        with_others = torch.cat([labels, others])
        assert torch.equal(with_others[before[i]], a[f"{key}labels_before"].long())
        assert torch.equal(with_others[after[i]], a[f"{key}labels_after"].long())
        assert torch.equal((after[i] != IGNORED).double(), a[f"{key}label_weights_after"])
        assert (after[i] >= 0).sum() == a[f"{key}num_pos"]


def check_atss_assigner(a: Arrays) -> None:
    """Without regions to ignore (`ignore`), which no data set of ours has."""
    for key in [k for k in a.data if re.search(r"__s\d+__gt_inds$", k)]:
        scene, stride = key.split("__")[0], key.split("__")[1][1:]
        anchors, boxes = a[f"anchors_{stride}"].float(), a[f"{scene}__gt_bboxes"].float()
        per_level = a[f"num_level_{stride}"].tolist()
        owners = assigners.atss(anchors, per_level, boxes, k=a.number("topk"))
        _same_owners(owners, a[key], key)
        chosen, own = owners >= 0, owners[owners >= 0]
        assert torch.equal(
            a[f"{scene}__gt_labels"][own], a[f"{scene}__s{stride}__labels"][chosen].long()
        )
        near(iou(anchors[chosen], boxes[own]), a[f"{scene}__s{stride}__max_overlaps"][chosen], key)
    per_level = a["num_level_8"].tolist()
    for key in a.data:
        if found := re.fullmatch(r"(\w+?)_topk(\d+)__gt_inds", key):
            boxes = a[f"{found[1]}__gt_bboxes"].float()
            _same_owners(
                assigners.atss(a["anchors_8"].float(), per_level, boxes, k=int(found[2])),
                a[key],
                key,
            )
    alone = assigners.atss(a["single__anchors"].float(), [1], a["single__gt_bboxes"].float())
    _same_owners(alone, a["single__gt_inds"], "single")


def _same_owners(owners: Tensor, numbers: Tensor, what: str) -> None:
    """The references count targets from 1, with 0 the background."""
    assert torch.equal(owners + 1, numbers.long()), what


def check_fcos_targets(a: Arrays) -> None:
    """Labels, distances and centerness. Without sampling of centres: an infinite radius."""
    points, labels_of_none = a["points"].float(), torch.tensor([a.number("num_classes")])
    per_level = a["num_per_level"].tolist()
    strides = strides_at(points, per_level)
    for key in [k for k in a.data if k.endswith("center__labels")]:
        scene, mode, _ = key.split("__")
        boxes = a[f"{scene}__gt_bboxes"].float()
        radius = 1.5 if mode == "center" else float("inf")
        owners = assigners.fcos(points, per_level, boxes, strides=strides, radius=radius)
        labels = torch.cat([a[f"{scene}__gt_labels"], labels_of_none])
        assert torch.equal(labels[owners], a[key].long()), key
        distances = sides(points[owners >= 0], boxes[owners[owners >= 0]])
        near(distances, a[f"{scene}__{mode}__pos_ltrb"], key, atol=1e-4)
        near(centerness(distances), a[f"{scene}__{mode}__pos_centerness"], key)


def check_anchors(a: Arrays) -> None:
    """Anchors, points, and which cells are no padding."""
    like = torch.zeros(())
    kinds: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "atss8": ((1.0,), (8.0,)),
        "atss4": ((1.0,), (8.0,)),
        "rpn8": (RATIOS, SCALES),
    }
    for kind, (ratios, scales) in kinds.items():
        shapes, strides = a.shapes(f"{kind}__featsizes"), a[f"{kind}__strides"].tolist()
        anchors = grid_anchors(shapes, strides, like, ratios, scales)
        counts = a[f"{kind}__num_per_level"].tolist()
        assert counts == [h * w * len(ratios) * len(scales) for h, w in shapes]
        for level, own in enumerate(anchors.split(counts)):
            near(
                own[: len(ratios) * len(scales)],
                a[f"{kind}__base_lvl{level}"],
                f"{kind}, level {level}",
            )
        if kind == "rpn8":
            near(anchors[sum(counts[:2]) :], a["rpn8__anchors_lvl2up"], kind)
        else:
            near(anchors, a[f"{kind}__anchors"], kind)
        usable = usable_cells(shapes, strides, a[f"{kind}__pad_shape_hw"].float().unsqueeze(0))[0]
        each = len(anchors) // len(usable)
        assert torch.equal(usable.repeat_interleave(each), a[f"{kind}__valid_flags"]), kind
    shapes = a.shapes("points8__featsizes")
    strides = strides_at(a["points8__points"], [h * w for h, w in shapes])
    near(grid_points(shapes, strides, like, offset=0.5), a["points8__points"], "points")


def check_coders(a: Arrays) -> None:
    """Deltas with three sets of deviations, classes apart too, and distances to sides."""
    priors, boxes, deltas = (a[k].float() for k in ("priors", "gts", "deltas"))
    for name in [k.removesuffix("__stds") for k in a.data if k.endswith("__stds")]:
        coder = Deltas(*a[f"{name}__stds"][1:3].tolist())
        near(coder.encode(priors, boxes), a[f"{name}__encode"], f"{name}, encode")
        decoded = coder.decode(priors, deltas)
        near(decoded, a[f"{name}__decode"], f"{name}, decode")
        near(clip(decoded, a["max_shape_hw"]), a[f"{name}__decode_clipped"], f"{name}, clipped")
        classes = coder.decode(
            priors.unsqueeze(1), a[f"{name}__deltas_3cls"].float().unflatten(1, (-1, 4))
        )
        near(classes.flatten(1), a[f"{name}__decode_3cls"], f"{name}, classes")
    points, boxes = a["dist__points"].float(), a["dist__gts"].float()
    distances = sides(points, boxes)
    near(distances, a["dist__encode_nomax"], "distances", atol=1e-4)
    near(
        distances.clamp(0, FARTHEST), a["dist__encode_max16_eps01"], "clamped distances", atol=1e-4
    )
    near(from_sides(points, a["dist__distances"].float()), a["dist__decode"], "boxes of distances")


def check_losses(a: Arrays) -> None:
    """Element losses, weighted sums, and a gradient. The log IoU is left out: no branch uses it."""
    labels = a["labels"]
    scores = a["scores"].float()
    weights = a["weights"].float()
    average = a["avg_factor"]
    logits = a["logits"].float().requires_grad_()
    row = (labels < a.number("num_classes")).nonzero().squeeze(1)
    there = (row, labels[row])
    quality = focal_negative(logits).index_put(
        there, quality_focal_loss(logits[there], scores[row])
    )
    focal = (0.75 * focal_negative(logits)).index_put(there, 0.25 * focal_positive(logits[there]))
    near(quality.sum(1), a["qfl_none"], "quality focal loss")
    near(focal, a["focal_none"], "focal loss")
    mean = (quality.sum(1) * weights).sum() / average
    near(mean, a["qfl_mean_w_avg"], "mean quality focal loss")
    near((focal.sum(1) * weights).sum() / average, a["focal_mean_w_avg"], "mean focal loss")
    near(torch.autograd.grad(mean, logits)[0], a["qfl_grad"], "gradient", rtol=1e-3, atol=1e-4)

    dfl = distribution_focal_loss(a["dfl_logits"].float(), a["dfl_target"].float())
    near(dfl, a["dfl_none"], "distribution focal loss")
    near((dfl * weights).sum() / 4, a["dfl_mean_w_avg"], "mean distribution focal loss")
    boxes, wanted = a["boxes_p"].float(), a["boxes_q"].float()
    error = 1 - giou(boxes, wanted)
    near(error, a["giou_none"], "GIoU")
    near(2 * (error * weights).sum() / 7, a["giou_w_avg"], "mean GIoU")
    near(5 * l1_loss(boxes / 100, wanted / 100)[1::2].sum() / 7, a["l1_w_avg"], "L1")
