"""The transformer decoder: self-attention, cross-attention, feed-forward; boxes refined layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from detrellis.boxes import inverse_sigmoid
from detrellis.nn.heads import Heads
from detrellis.nn.mlp import FeedForward
from detrellis.types import DecoderOutput, Memory, Queries, Segment, Spatial

Refine = Literal["none", "detached", "look_forward_twice"]


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
        """`x (B, N, D)` to new `x`."""
        x = self.norm_self(x + self.dropout(self.self_attention(x, where.position, segments)))
        x = self.norm_cross(x + self.dropout(self.cross_attention(x, where, memory)))
        out: Tensor = self.feed_forward(x)
        return out


class Decoder(nn.Module):
    """The layers, and what happens to the boxes between them.

    `refine`: `"none"` keeps the references; `"detached"` moves them at each layer and stops the gradient there;
    `"look_forward_twice"` lets the loss of layer i reach the box head of layer i-1 too (DINO, section 3.4). Only
    gradients differ between the last two. `final_norm` normalises the heads' input, never the stream. `position` says
    where the queries look at each layer (`nn/spatial.py`).
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
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.heads, self.position = heads, position
        self.final_norm = nn.LayerNorm(width) if final_norm else None
        self.refine, self.eps = refine, eps

    def forward(
        self, queries: Queries, memory: Memory, segments: Sequence[Segment], *, every_layer: bool
    ) -> DecoderOutput:
        """Outputs of every layer, or of the last one only, which costs no other layer's class head."""
        x, boxes = queries.content, queries.boxes
        reads = boxes  # what the layer sees; a detached copy from the second layer on
        outputs: list[DecoderOutput] = []
        for i, layer in enumerate(self.layers):
            x = layer(x, self.position(i, x, queries, reads, memory), memory, segments)
            last = i == len(self.layers) - 1
            if every_layer or last:
                states = x if self.final_norm is None else self.final_norm(x)
                logits, judged = self.heads.classify(i, states), self.heads.judge(i, states)
                outputs.append(DecoderOutput(logits, self._moved(i, states, boxes), states, judged))
            if not last and self.refine != "none":
                boxes = self._moved(i, x, reads)
                if self.refine == "detached":
                    boxes = boxes.detach()
                reads = boxes.detach()
        layers = (None if part[0] is None else torch.stack(part) for part in zip(*outputs, strict=True))
        return DecoderOutput(*layers)  # type: ignore[arg-type]

    def _moved(self, layer: int, states: Tensor, references: Tensor | None) -> Tensor:
        """The references moved by the layer's box head; a point gives the centre alone, no reference nothing."""
        delta = self.heads.move(layer, states)
        if references is None:
            return delta.sigmoid()
        logits = inverse_sigmoid(references, self.eps)
        if logits.shape[-1] == 2:
            logits = torch.cat([logits, torch.zeros_like(logits)], dim=-1)
        return (delta + logits).sigmoid()
