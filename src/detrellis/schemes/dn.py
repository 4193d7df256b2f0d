"""DN-DETR's denoising (Li et al., 2022, section 4).

Ground-truth boxes and labels are disturbed and given to the decoder as extra queries, which must
recover them. They need no matching, so the decoder learns to refine boxes from the first step on.
The last channel of their content is 1, and 0 in the contents of the main queries where the detector
keeps that channel free (`indicator`).

| deviation from the released code | why |
| --- | --- |
| boxes are counted over all processes, and at least as one | as everywhere else |
| `label_embed` has no row "unknown" | it is a part of the detector: the main queries keep it at inference |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrellis.schemes.base import Extension, Step, TrainingScheme
from detrellis.schemes.config import DNConfig
from detrellis.schemes.denoising import Layout, denoising_block, lay_out, place, unused
from detrellis.supervision import leaving_out
from detrellis.types import Queries, Targets


class Noise(NamedTuple):
    """The random draws for `R = G T` rows, group by group in target order."""

    flip: Tensor  # (R,) in [0, 1): the label is replaced where this is below the flip probability
    label: Tensor  # (R,) the label to replace it with
    shift: Tensor  # (R, 4) in [-1, 1): of the centre in half sizes, of the size in sizes


def draw_noise(rows: int, classes: int, generator: torch.Generator) -> Noise:
    """Draw on the host from `generator`."""
    return Noise(
        torch.rand(rows, generator=generator),
        torch.randint(classes, (rows,), generator=generator),
        2 * torch.rand(rows, 4, generator=generator) - 1,
    )


def disturb(
    targets: Targets, layout: Layout, noise: Noise, *, flip: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Disturbed labels `(R,)` and boxes `(R, 4)`:
    the centre moves by up to half a size, the size by a size.
    """
    labels = torch.where(noise.flip < flip, noise.label, targets.labels[layout.target])
    boxes = targets.boxes[layout.target]
    reach = torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], dim=1)
    return labels, (boxes + noise.shift.to(boxes.dtype) * reach * scale).clamp(0, 1)


class Denoising(TrainingScheme):
    """DN-DETR's denoising queries; `eps` is that of the detector's inverse sigmoid."""

    name = "dn"
    requires = frozenset({"box_queries", "sigmoid_scores"})

    def __init__(self, config: DNConfig, width: int, classes: int, eps: float) -> None:
        super().__init__()
        self.config, self.classes, self.eps = config, classes, eps
        self.label_embed = nn.Embedding(classes, width - config.indicator)

    @property
    def extra_queries(self) -> int:
        """Within the total; where only groups are given, their number in an image with one box."""
        return self.config.total or self.config.groups

    def extend(self, step: Step) -> Extension:
        """The denoising block, or none where the batch has no boxes."""
        largest = max(step.targets.sizes)
        if largest == 0:
            return Extension([])
        groups = (
            self.config.groups
            if self.config.total is None
            else max(1, self.config.total // largest)
        )
        layout = lay_out(step.targets, groups, kinds=1)
        noise = draw_noise(len(layout.slot), self.classes, self.generator)
        noise = Noise(*(t.to(step.targets.labels.device, non_blocking=True) for t in noise))
        rule = step.supervision.rule
        if not self.config.padded_background:
            rule = leaving_out(rule, unused(layout, len(step.targets.sizes)))
        queries = self.queries(step.targets, layout, noise)
        return Extension([denoising_block("dn", queries, layout, step, self.config.sees, rule)])

    def queries(self, targets: Targets, layout: Layout, noise: Noise) -> Queries:
        """Contents `[label, 1]`, or of the label alone, and disturbed boxes in their slots."""
        config = self.config
        labels, boxes = disturb(
            targets, layout, noise, flip=config.label_noise, scale=config.box_noise
        )
        contents = self.label_embed(labels)
        if config.indicator:
            contents = torch.cat([contents, torch.ones_like(contents[:, :1])], dim=1)
        return place(layout, len(targets.sizes), contents, boxes, self.eps)
