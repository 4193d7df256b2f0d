"""The transformer decoder: self-attention, cross-attention, feed-forward; boxes refined layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detrellis.nn.distinct import keep_distinct, withhold
from detrellis.nn.heads import Heads
from detrellis.nn.mlp import FeedForward
from detrellis.nn.refine import IterativeRefinement, Refine
from detrellis.types import DecoderOutput, Memory, Queries, Segment, Spatial


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with residual and post-norm.

    `self_attention` is any module called with `(x, position, segments)`, `cross` one called with `(x, where, memory)`.
    """

    def __init__(
        self,
        self_attention: nn.Module,
        cross: nn.Module,
        feed_forward: FeedForward,
        width: int,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, cross
        self.norm_self, self.norm_cross = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, where: Spatial, memory: Memory, segments: Sequence[Segment]) -> Tensor:
        """The queries `x (B, N, D)` after this layer, `(B, N, D)`."""
        x = self.norm_self(x + self.dropout(self.self_attention(x, where.position, segments)))
        x = self.norm_cross(x + self.dropout(self.cross_attention(x, where, memory)))
        out: Tensor = self.feed_forward(x)
        return out


class Decoder(nn.Module):
    """The layers, and what happens to the boxes between them.

    `refine`: `"none"` keeps the references; `"detached"` refines them at each layer and stops the gradient there;
    `"look_forward_twice"` lets the loss of layer i reach the box head of layer i-1 too (DINO, section 3.4). Only
    gradients differ between the last two. `final_norm` normalises the heads' input, never the stream. `position` says
    where the queries look at each layer (`nn/spatial.py`). `distinct`: from the second layer on, queries whose IoU with
    a better one exceeds this are dropped for the layer (`nn/distinct.py`); None: off. It needs boxes that are refined.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        heads: Heads,
        *,
        refine: Refine,
        position: nn.Module,
        final_norm: bool = False,
        width: int = 256,
        eps: float = 1e-5,
        distinct: float | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.distinct = distinct
        self.heads, self.position = heads, position
        self.final_norm = nn.LayerNorm(width) if final_norm else None
        self.refine, self.eps = refine, eps

    def forward(
        self, queries: Queries, memory: Memory, segments: Sequence[Segment], *, every_layer: bool
    ) -> DecoderOutput:
        """Outputs of every layer, or of the last one only, which costs no other layer's class head."""
        x, outputs = queries.content, list[DecoderOutput]()
        used, heads = segments, self.heads.of(segments)
        boxes = IterativeRefinement(heads, queries.boxes, self.refine, self.eps)
        for i, layer in enumerate(self.layers):
            # The layer itself, at its place.
            x = layer(x, self.position(i, x, queries, boxes.references, memory), memory, used)
            last = i == len(self.layers) - 1
            # What the heads say after it.
            wanted = every_layer or last
            if wanted or self.distinct is not None:
                states = x if self.final_norm is None else self.final_norm(x)
                logits = heads.logits(i, states)
            refined = boxes.step(i, x, states if wanted else None, last=last)
            if refined is not None:
                iou_logits = heads.iou_logits(i, states)
                outputs.append(DecoderOutput(withhold(logits, used), refined.boxes, states, iou_logits))
            # The queries that the next layer uses.
            if not last and self.distinct is not None:
                assert boxes.references is not None
                used = keep_distinct(segments, logits, boxes.references, self.distinct)
        return stack(outputs)


def stack(layers: Sequence[DecoderOutput]) -> DecoderOutput:
    """The outputs of all layers, each without the dimension `L`, as one."""
    ious = [output.iou_logits for output in layers if output.iou_logits is not None]
    return DecoderOutput(
        torch.stack([output.logits for output in layers]),
        torch.stack([output.boxes for output in layers]),
        torch.stack([output.states for output in layers]),
        torch.stack(ious) if ious else None,
    )
