"""What the denoising papers share:
rows of disturbed targets, their slots in a block, and the block itself.

Each target stands once in each group (with contrastive denoising twice: a positive and a negative).
All images of a batch have the same slots; one that an image does not fill has content 0 and the box
of logit 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from detrellis.boxes import inverse_sigmoid
from detrellis.matching import known_assignment
from detrellis.schemes.base import QueryBlock, Step
from detrellis.schemes.config import Sees
from detrellis.set_loss import LossRule
from detrellis.types import Assignment, Queries, Targets, on_device


class Layout(NamedTuple):
    """Where the rows stand: slot `(g * kinds + kind) * max + j` for target j of its image in group
    g.
    """

    groups: int
    kinds: int  # 1: positives only; 2: positives, then negatives
    slots: int  # groups * kinds * max, for every image
    image: Tensor  # (R,)
    slot: Tensor  # (R,)
    target: Tensor  # (R,) row of the packed targets
    positive: Tensor  # (R,) bool


def lay_out(targets: Targets, groups: int, kinds: int) -> Layout:
    """Slots of the `R = groups * kinds * T` rows,
    on the targets' device, without asking the device for anything.
    """
    device = targets.labels.device
    total = len(targets.labels)
    largest = max(targets.sizes, default=0)
    places = [j for size in targets.sizes for j in range(size)]
    place = on_device(places, device, torch.int64)
    group = torch.arange(groups, device=device).view(-1, 1, 1)
    kind = torch.arange(kinds, device=device).view(1, -1, 1)
    slot = (group * kinds + kind) * largest + place
    shape = (groups, kinds, total)
    rows = (
        t.expand(shape).flatten()
        for t in (targets.image, slot, torch.arange(total, device=device), kind == 0)
    )
    return Layout(groups, kinds, groups * kinds * largest, *rows)


def place(layout: Layout, batch: int, contents: Tensor, boxes: Tensor, eps: float) -> Queries:
    """Rows `(R, D)` and `(R, 4)` in their slots: `(B, slots, ...)`."""
    content = contents.new_zeros(batch, layout.slots, contents.shape[-1])
    logits = boxes.new_zeros(batch, layout.slots, 4)
    where = (layout.image, layout.slot)
    return Queries(
        content.index_put(where, contents),
        boxes=logits.index_put(where, inverse_sigmoid(boxes, eps)).sigmoid(),
    )


def unused(layout: Layout, batch: int) -> Tensor:
    """The slots that an image does not fill: `(B, slots)` bool."""
    empty = torch.ones(batch, layout.slots, dtype=torch.bool, device=layout.slot.device)
    return empty.index_put((layout.image, layout.slot), empty.new_zeros(()))


def positives(layout: Layout, layers: int) -> Assignment:
    """Every positive slot with its own target, at every layer, the only candidate of its set."""
    # By place, not by mask: counting a mask's entries would wait for the device.
    rows = torch.stack([layout.image, layout.slot, layout.target]).view(
        3, layout.groups, layout.kinds, -1
    )
    image, query, target = rows[:, :, 0].flatten(1)
    return known_assignment(image, query, target, layers)


def denoising_block(
    name: str,
    queries: Queries,
    layout: Layout,
    step: Step,
    sees: Sees,
    rule: LossRule | None = None,
) -> QueryBlock:
    """The queries as a block whose groups see the main queries but not each other;
    `rule`: the main one by default.
    """
    counts = tuple(layout.groups * size for size in step.targets.sizes)
    supervision = step.supervision.known(positives(layout, step.detector.decoder.outputs), counts)
    if rule is not None:
        supervision = replace(supervision, rule=rule)
    normaliser = step.mean_boxes.clamp(min=1) * layout.groups
    read = ("main",) if sees == "main" else ("main", "group")
    return QueryBlock(
        name, queries, supervision, layout.groups, sees=read, normaliser=normaliser, repeats=True
    )
