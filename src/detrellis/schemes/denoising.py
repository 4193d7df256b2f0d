"""Contrastive denoising (DINO, section 3.3).

Ground-truth boxes and labels are disturbed and given to the decoder as extra queries: a positive, lightly disturbed,
must recover its box; a negative, disturbed more, must say "no object". They need no matching, so the decoder learns to
refine boxes from the first step on.

| deviation from the paper | why |
| --- | --- |
| labels are flipped with half of `label_noise` | as the released code does |
| `box_noise` is 1.0 | the training script's value; the configuration file's 0.4 is overridden there |
| padded slots learn "no object", as negatives do | as the released code does |
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrellis.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from detrellis.matching import Known
from detrellis.schemes.base import QueryBlock, Step, TrainingScheme
from detrellis.types import Assignment, Queries, Targets


class Noise(NamedTuple):
    """The random draws for `R = 2 G T` rows: group by group, all positives, then all negatives, in target order."""

    flip: Tensor  # (R,) in [0, 1): the label is replaced where this is below the flip probability
    label: Tensor  # (R,) the label to replace it with
    sign: Tensor  # (R, 4) -1 or 1: where each corner coordinate moves
    shift: Tensor  # (R, 4) in [0, 1): how far


def draw_noise(rows: int, classes: int, generator: torch.Generator) -> Noise:
    """Draw on the host from `generator`."""
    return Noise(
        torch.rand(rows, generator=generator),
        torch.randint(classes, (rows,), generator=generator),
        torch.randint(2, (rows, 4), generator=generator) * 2 - 1,
        torch.rand(rows, 4, generator=generator),
    )


def group_count(number: int, most: int) -> int:
    """Groups of denoising queries for `most` targets in the fullest image, from a budget of `number` positives.

    The budget is doubled for the negatives, and compared undivided: fewer than 50 is a number of groups itself.
    """
    doubled = 2 * number
    if most == 0:
        return 1
    return max(1, doubled // (2 * most) if doubled >= 100 else doubled)


class Layout(NamedTuple):
    """Where the rows stand: slot `g * 2 max + j` for target j of its image in group g, negatives `max` further on."""

    groups: int
    slots: int  # 2 G max, for every image
    image: Tensor  # (R,)
    slot: Tensor  # (R,)
    target: Tensor  # (R,) row of the packed targets
    positive: Tensor  # (R,) bool


def lay_out(targets: Targets, groups: int) -> Layout:
    """Slots of all rows, on the targets' device, without asking the device for anything."""
    device, total, most = targets.labels.device, len(targets.labels), max(targets.sizes, default=0)
    place = torch.tensor([j for size in targets.sizes for j in range(size)], dtype=torch.int64, device=device)
    group = torch.arange(groups, device=device).view(-1, 1, 1)
    negative = torch.arange(2, device=device).view(1, -1, 1)
    slot = group * (2 * most) + negative * most + place
    shape = (groups, 2, total)
    rows = (t.expand(shape).flatten() for t in (targets.image, slot, torch.arange(total, device=device), negative == 0))
    return Layout(groups, 2 * groups * most, *rows)


def disturb(targets: Targets, layout: Layout, noise: Noise, *, flip: float, scale: float) -> tuple[Tensor, Tensor]:
    """Disturbed labels `(R,)` and boxes `(R, 4)`.

    Each corner moves by up to half the box's size times `scale`, a negative's by half to the whole. Corners may cross:
    the size then is negative, and stays so.
    """
    labels = torch.where(noise.flip < flip, noise.label, targets.labels[layout.target])
    boxes = targets.boxes[layout.target]
    shift = (noise.shift + (~layout.positive).unsqueeze(-1)) * noise.sign
    half = boxes[:, 2:].repeat(1, 2) / 2
    corners = cxcywh_to_xyxy(boxes) + shift.to(boxes.dtype) * half * scale
    return labels, xyxy_to_cxcywh(corners.clamp(0, 1))


class ContrastiveDenoising(TrainingScheme):
    """DINO's contrastive denoising queries, one block of `G` groups that see the main queries but not each other."""

    name = "cdn"
    requires = frozenset({"box_queries"})

    def __init__(
        self,
        width: int,
        classes: int,
        eps: float,
        *,
        number: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
    ) -> None:
        super().__init__()
        self.number, self.label_noise, self.box_noise = number, label_noise, box_noise
        self.classes, self.eps = classes, eps
        # One row more than classes, as in the released code, whose last row stands for "unknown" and stays unused.
        self.label_embed = nn.Embedding(classes + 1, width)

    @property
    def extra_queries(self) -> int:
        """Positives and negatives within the budget; a fuller image still gets one group."""
        return 2 * self.number

    def blocks(self, step: Step) -> list[QueryBlock]:
        """The denoising block, or none where the batch has no boxes."""
        layout = lay_out(step.targets, group_count(self.number, max(step.targets.sizes)))
        if layout.slots == 0:
            return []
        noise = draw_noise(len(layout.slot), self.classes, self.generator)
        noise = Noise(*(t.to(step.targets.labels.device, non_blocking=True) for t in noise))
        queries = self.queries(step.targets, layout, noise)
        layers = len(step.detector.decoder.layers)  # type: ignore[arg-type]
        supervision = replace(step.supervision, assign=Known(positives(layout, layers)))
        normaliser = step.mean_boxes.clamp(min=1) * layout.groups
        return [QueryBlock("cdn", queries, supervision, layout.groups, sees=("main",), normaliser=normaliser)]

    def queries(self, targets: Targets, layout: Layout, noise: Noise) -> Queries:
        """Contents and boxes `(B, slots, ...)`; a slot without a row has content 0 and the box of logit 0."""
        flip = self.label_noise / 2
        labels, boxes = disturb(targets, layout, noise, flip=flip, scale=self.box_noise)
        embedded = self.label_embed(labels)
        content = embedded.new_zeros(len(targets.sizes), layout.slots, embedded.shape[-1])
        logits = boxes.new_zeros(len(targets.sizes), layout.slots, 4)
        where = (layout.image, layout.slot)
        return Queries(
            content.index_put(where, embedded),
            boxes=logits.index_put(where, inverse_sigmoid(boxes, self.eps)).sigmoid(),
        )


def positives(layout: Layout, layers: int) -> Assignment:
    """Every positive slot with its own target, at every layer."""
    # By place, not by mask: counting a mask's entries would wait for the device.
    rows = torch.stack([layout.image, layout.slot, layout.target]).view(3, layout.groups, 2, -1)
    chosen = rows[:, :, 0].flatten(1)
    count = chosen.shape[1]
    layer = torch.arange(layers, device=chosen.device).repeat_interleave(count, output_size=layers * count)
    image, query, target = chosen.repeat(1, layers)
    return Assignment(layer, image, query, target, torch.zeros_like(layer))
