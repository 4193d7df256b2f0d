"""The boxes of one pass through the decoder:
what each layer reads, and what the box heads make of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from detrellis.boxes import inverse_sigmoid, relative_boxes
from detrellis.nn.distribution import Bins, mean_boxes, weighting
from detrellis.nn.heads import Heads, SegmentHeads
from detrellis.types import DecoderOutput, Passed, SideDistributions

Refine = Literal["none", "detached", "look_forward_twice"]
# What a box head says `(B, N, 4)`, and references `(B, N, 4 or 2)`, to boxes `(B, N, 4)`.
Move = Callable[[Tensor, Tensor | None], Tensor]


class Refined(NamedTuple):
    """What the box heads say after one layer."""

    boxes: Tensor  # (B, N, 4)
    sides: SideDistributions | None = None  # of one layer, without the dimension `L`


class IterativeRefinement:
    """Boxes refined layer by layer (Deformable DETR, section 4.2),
    or references that stay where they are.

    `refine` as in `Decoder`; `move` applies what a box head says, in logit space or otherwise.
    """

    def __init__(
        self, heads: Heads | SegmentHeads, references: Tensor | None, refine: Refine, move: Move
    ) -> None:
        self.heads, self.refine, self.move = heads, refine, move
        # `boxes` is what losses reach through the outputs, `references (B, N, 2 or 4)` what a layer
        # reads: equal, without gradient from the second layer on.
        self.boxes = self.references = references
        self.passed: list[Passed] = []  # by the layers, whose outputs are asked for

    def step(self, layer: int, x: Tensor, states: Tensor | None, *, last: bool) -> Refined | None:
        """Go past decoder layer `layer`, which left the queries `x (B, N, D)`.

        `states` are what the heads read of them for the output; None where nobody asks for one, and
        gets none.
        """
        deltas = None if states is None else self.heads.deltas(layer, states)
        output = None if deltas is None else Refined(self.move(deltas, self.boxes))
        if not last and self.refine != "none":
            delta = deltas if deltas is not None and states is x else self.heads.deltas(layer, x)
            if output is not None and delta is deltas and self.boxes is self.references:
                boxes = output.boxes
            else:
                boxes = self.move(delta, self.references)
            self.references = boxes.detach()
            self.boxes = boxes if self.refine == "look_forward_twice" else self.references
        if states is not None:
            self.passed.append(Passed(x, self.references, self.boxes))
        return output


class DistributionRefinement:
    """Fine-grained distribution refinement (D-FINE, section 4.1): layers add to the logits of
    distributions over how far each side lies from that of a box, which is fixed once the first
    layer has moved its reference there.

    A layer's box head reads its queries and, without gradient, those of the layer before.
    References are the boxes that the distributions have as their means.
    """

    def __init__(
        self, heads: Heads | SegmentHeads, references: Tensor, bins: Bins, eps: float
    ) -> None:
        self.heads, self.bins, self.eps = heads, bins, eps
        self.references, self.values = references, weighting(bins, references)
        self.initial_boxes: Tensor | None = None
        # The queries after the first layer, and after the one before
        self.first = self.before = references
        self.logits = references
        self.passed: list[Passed] = []  # boxes alone would not do

    def step(self, layer: int, x: Tensor, states: Tensor | None, *, last: bool) -> Refined:
        """As `IterativeRefinement.step`; there is an output whether it is asked for or not."""
        first = self.initial_boxes is None
        if self.initial_boxes is None:
            self.first, self.initial_boxes = (
                x,
                moved(self.heads.initial_deltas(x), self.references, self.eps),
            )
        deltas = self.heads.deltas(layer, x if first else x + self.before.detach())
        deltas = deltas.to(self.values.dtype).unflatten(-1, (4, self.bins.number + 1))
        self.logits, self.before = deltas if first else deltas + self.logits, x
        sides = SideDistributions(
            self.logits, self.initial_boxes.detach(), self.values, self.bins.scale
        )
        boxes = mean_boxes(sides)
        self.references = boxes.detach()
        return Refined(boxes, sides)

    def initial(self) -> DecoderOutput:
        """The output of the first layer before there are distributions."""
        assert self.initial_boxes is not None
        logits = self.heads.logits(0, self.first)
        return DecoderOutput(logits[None], self.initial_boxes[None], self.first[None])


def moved(delta: Tensor, references: Tensor | None, eps: float) -> Tensor:
    """The references `(B, N, 4 or 2)` moved by what a box head says,
    `delta (B, N, 4)`, in logit space: `(B, N, 4)`.

    A point is the centre alone; without references the head gives the box itself.
    """
    if references is None:
        return delta.sigmoid()
    logits = inverse_sigmoid(references, eps)
    if logits.shape[-1] == 2:
        logits = torch.cat([logits, torch.zeros_like(logits)], dim=-1)
    return (delta + logits).sigmoid()


def moved_relative(delta: Tensor, references: Tensor | None) -> Tensor:
    """As `moved`, with boxes in the place of logits: see `boxes.relative_boxes`."""
    assert references is not None, "re-parameterised boxes are relative to boxes"
    return relative_boxes(delta, references)
