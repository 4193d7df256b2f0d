"""The boxes of one pass through the decoder: what each layer reads, and what the box heads make of it."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from detrellis.boxes import inverse_sigmoid
from detrellis.nn.heads import Heads, SegmentHeads

Refine = Literal["none", "detached", "look_forward_twice"]


class Refined(NamedTuple):
    """What the box heads say after one layer."""

    boxes: Tensor  # (B, N, 4)


class Refinement(Protocol):
    """How boxes go from layer to layer."""

    references: (
        Tensor | None
    )  # (B, N, 2 or 4) points or boxes that the next layer reads, without gradient after the first

    def step(self, layer: int, x: Tensor, states: Tensor | None, *, last: bool) -> Refined | None:
        """Go past decoder layer `layer`, which left the queries `x (B, N, D)`.

        `states` are what the heads read of them for the output; None where nobody asks for one.
        """


class IterativeRefinement:
    """Boxes refined in logit space (Deformable DETR, section 4.2), or references that stay where they are.

    `refine` as in `Decoder`; `eps` is that of the inverse sigmoid.
    """

    def __init__(self, heads: Heads | SegmentHeads, references: Tensor | None, refine: Refine, eps: float) -> None:
        self.heads, self.refine, self.eps = heads, refine, eps
        # `boxes` is what losses reach through the outputs, `references` what a layer reads: equal, without gradient
        # from the second layer on.
        self.boxes = self.references = references

    def step(self, layer: int, x: Tensor, states: Tensor | None, *, last: bool) -> Refined | None:
        """As in `Refinement`."""
        said = None if states is None else self.heads.deltas(layer, states)
        output = None if said is None else Refined(moved(said, self.boxes, self.eps))
        if not last and self.refine != "none":
            delta = said if said is not None and states is x else self.heads.deltas(layer, x)
            boxes = moved(delta, self.references, self.eps)
            self.references = boxes.detach()
            self.boxes = boxes if self.refine == "look_forward_twice" else self.references
        return output


def moved(delta: Tensor, references: Tensor | None, eps: float) -> Tensor:
    """The references `(B, N, 4 or 2)` moved by what a box head says, `delta (B, N, 4)`, in logit space: `(B, N, 4)`.

    A point is the centre alone; without references the head gives the box itself.
    """
    if references is None:
        return delta.sigmoid()
    logits = inverse_sigmoid(references, eps)
    if logits.shape[-1] == 2:
        logits = torch.cat([logits, torch.zeros_like(logits)], dim=-1)
    return (delta + logits).sigmoid()
