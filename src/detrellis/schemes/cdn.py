"""Contrastive denoising (DINO, section 3.3).

Ground-truth boxes and labels are disturbed and given to the decoder as extra queries: a positive,
lightly disturbed, must recover its box; a negative, disturbed more, must say "no object". They need
no matching, so the decoder learns to refine boxes from the first step on.

| deviation from the paper | why |
| --- | --- |
| labels are flipped with half of `label_noise` | as the released code does |
| `box_noise` is 1.0 | the training script's value; the configuration file's 0.4 is overridden there |
| padded slots learn "no object", as negatives do | as the released code does |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrellis.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrellis.schemes.base import Extension, Step, TrainingScheme
from detrellis.schemes.config import CDNConfig
from detrellis.schemes.denoising import Layout, denoising_block, lay_out, place
from detrellis.types import Queries, Targets


class Noise(NamedTuple):
    """The random draws for `R = 2 G T` rows:
    group by group, all positives, then all negatives, in target order.
    """

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


def group_count(number: int, largest: int) -> int:
    """Groups of denoising queries for `largest` targets in the fullest image,
    from a budget of `number` positives.

    The budget is doubled for the negatives, and compared undivided: fewer than 50 is a number of
    groups itself.
    """
    doubled = 2 * number
    if largest == 0:
        return 1
    return max(1, doubled // (2 * largest) if doubled >= 100 else doubled)


def disturb(
    targets: Targets, layout: Layout, noise: Noise, *, flip: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Disturbed labels `(R,)` and boxes `(R, 4)`.

    Each corner moves by up to half the box's size times `scale`, a negative's by half to the whole.
    Corners may cross: the size then is negative, and stays so.
    """
    labels = torch.where(noise.flip < flip, noise.label, targets.labels[layout.target])
    boxes = targets.boxes[layout.target]
    shift = (noise.shift + (~layout.positive).unsqueeze(-1)) * noise.sign
    half = boxes[:, 2:].repeat(1, 2) / 2
    corners = cxcywh_to_xyxy(boxes) + shift.to(boxes.dtype) * half * scale
    return labels, xyxy_to_cxcywh(corners.clamp(0, 1))


class ContrastiveDenoising(TrainingScheme):
    """DINO's contrastive denoising queries,
    one block of `G` groups that see the main queries but not each other.

    `eps` is that of the detector's inverse sigmoid.
    """

    name = "cdn"
    requires = frozenset({"box_queries"})

    def __init__(self, config: CDNConfig, width: int, classes: int, eps: float) -> None:
        super().__init__()
        self.config, self.classes, self.eps = config, classes, eps
        # One row more than classes, as in the released code, whose last row stands for "unknown"
        # and stays unused.
        self.label_embed = nn.Embedding(classes + 1, width)

    @property
    def extra_queries(self) -> int:
        """Positives and negatives within the budget; a fuller image still gets one group."""
        return 2 * self.config.number

    def extend(self, step: Step) -> Extension:
        """The denoising block, or none where the batch has no boxes."""
        largest = max(step.targets.sizes)
        if largest == 0:
            return Extension([])
        layout = lay_out(step.targets, group_count(self.config.number, largest), kinds=2)
        noise = draw_noise(len(layout.slot), self.classes, self.generator)
        noise = Noise(*(t.to(step.targets.labels.device, non_blocking=True) for t in noise))
        queries = self.queries(step.targets, layout, noise)
        return Extension([denoising_block("cdn", queries, layout, step, self.config.sees)])

    def queries(self, targets: Targets, layout: Layout, noise: Noise) -> Queries:
        """Disturbed labels and boxes in their slots."""
        flip = self.config.label_noise / 2
        labels, boxes = disturb(targets, layout, noise, flip=flip, scale=self.config.box_noise)
        return place(layout, len(targets.sizes), self.label_embed(labels), boxes, self.eps)
