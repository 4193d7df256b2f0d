"""The transformer decoder: self-attention, cross-attention, feed-forward;
boxes refined layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor, nn

from detrellis.nn.constants import kept
from detrellis.nn.distinct import keep_distinct, withhold
from detrellis.nn.distribution import Gateway
from detrellis.nn.heads import Heads, SegmentHeads, joined
from detrellis.nn.mlp import FeedForward
from detrellis.nn.ranked import RankLayers
from detrellis.nn.recompute import recomputable
from detrellis.nn.refine import (
    DistributionRefinement,
    IterativeRefinement,
    Move,
    Refine,
    Refined,
    moved,
    moved_relative,
)
from detrellis.nn.relation import PositionRelation
from detrellis.nn.spatial import AnchorPosition
from detrellis.types import (
    Between,
    DecoderOutput,
    Memory,
    Passed,
    Queries,
    Segment,
    SideDistributions,
    Spatial,
)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with residual and post-norm.

    `self_attention` is any module called with `(x, position, segments)`, `cross` one called with
    `(x, where, memory)`. `gated`: what cross-attention reads comes through a gateway instead of a
    residual (D-FINE).
    """

    recomputed = False  # in the backward pass

    def __init__(
        self,
        self_attention: nn.Module,
        cross: nn.Module,
        feed_forward: FeedForward,
        width: int,
        *,
        dropout: float = 0.0,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, cross
        self.norm_self = nn.LayerNorm(width)
        self.norm_cross = None if gated else nn.LayerNorm(width)
        self.gateway = Gateway(width) if gated else None
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = feed_forward

    @recomputable
    def forward(
        self, x: Tensor, where: Spatial, memory: Memory, segments: Sequence[Segment]
    ) -> tuple[Tensor, Tensor]:
        """The queries `x (B, N, D)` after this layer,
        and after its cross-attention, `(B, N, D)` each.
        """
        read = self.read(self.mix(x, where.position, segments), where, memory)
        out: Tensor = self.feed_forward(read)
        return out, read

    def mix(self, x: Tensor, position: Tensor, segments: Sequence[Segment]) -> Tensor:
        """The queries `x (B, N, D)` after self-attention;
        those of segments that have none stay as they are.
        """
        if all(segment.attends for segment in segments):
            mixed: Tensor = self.norm_self(
                x + self.dropout(self.self_attention(x, position, segments))
            )
            return mixed
        rows = _attending(tuple((s.size, s.attends) for s in segments), x.device)
        attending = [segment for segment in segments if segment.attends]
        return x.index_copy(
            1, rows, self.mix(x[:, rows], position.expand_as(x)[:, rows], attending)
        )

    def read(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """The queries `x (B, N, D)` after cross-attention."""
        attended = self.dropout(self.cross_attention(x, where, memory))
        out: Tensor = x + attended
        if self.gateway is not None:
            out = self.gateway(x, attended)
        elif self.norm_cross is not None:
            out = self.norm_cross(out)
        return out


@kept(16)
def _attending(segments: tuple[tuple[int, bool], ...], device: torch.device) -> Tensor:
    """The places of the queries that have self-attention, of segments of these sizes."""
    each = torch.cat([torch.full((size,), attends) for size, attends in segments])
    return each.nonzero().flatten().to(device)


class CrossFirstLayer(DecoderLayer):
    """As `DecoderLayer`, with cross-attention before self-attention: in Mask2Former because the
    first queries know nothing of the image, in MS-DETR because what they have read is not yet told
    apart."""

    @recomputable
    def forward(
        self, x: Tensor, where: Spatial, memory: Memory, segments: Sequence[Segment]
    ) -> tuple[Tensor, Tensor]:
        """As `DecoderLayer.forward`."""
        read = self.read(x, where, memory)
        out: Tensor = self.feed_forward(self.mix(read, where.position, segments))
        return out, read


class Decoder(nn.Module):
    """The layers, and what happens to the boxes between them.

    `refine`: `"none"` keeps the references; `"detached"` refines them at each layer and stops the
    gradient there; `"look_forward_twice"` lets the loss of layer i reach the box head of layer i-1
    too (DINO, section 3.4). Only gradients differ between the last two. `final_norm` normalises the
    heads' input, never the stream. `position` says where the queries look at each layer
    (`nn/spatial.py`). `distinct`: from the second layer on, queries whose IoU with a better one
    exceeds this are dropped for the layer (`nn/distinct.py`); None: off. It needs boxes that are
    refined. Heads that have bins refine distributions instead, whatever `refine` says.
    `double_norm`: class and mask heads read the normalised queries normalised once more. `before`:
    the queries give an output before the first layer too, with their references as boxes (both Mask
    DINO). `relative`: what the box heads say is relative to the size of the boxes that it moves,
    instead of in logit space (LW-DETR). `relation`: from the second layer on, self-attention reads
    how boxes lie to each other. `ranked`: queries know how they rank by score.
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
        relative: bool = False,
        relation: PositionRelation | None = None,
        ranked: RankLayers | None = None,
        double_norm: bool = False,
        before: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.distinct, self.relation, self.ranked = distinct, relation, ranked
        # Whether a layer needs the scores of the one before
        self.scored = distinct is not None or ranked is not None
        self.heads, self.position = heads, position
        self.final_norm = nn.LayerNorm(width) if final_norm else None
        self.refine, self.eps = refine, eps
        self.double_norm, self.before = double_norm, before
        self.move: Move = moved_relative if relative else partial(moved, eps=eps)

    @property
    def outputs(self) -> int:
        """Outputs that it gives in training."""
        return len(self.layers) + self.before

    def forward(
        self, queries: Queries, memory: Memory, segments: Sequence[Segment], *, every_layer: bool
    ) -> DecoderOutput:
        """Outputs of every layer, or of the last one only,
        which costs no other layer's class head.
        """
        x = queries.content
        outputs: list[DecoderOutput] = []
        used, heads = segments, self.heads.of(segments)
        boxes = self._refinement(heads, queries.boxes)
        ranks = None if self.ranked is None else self.ranked.first(segments, x.device)
        if every_layer and self.before:
            outputs.append(self._of_queries(heads, queries))
        # What is read off boxes alone is the same at each layer where they stay.
        alike = (
            self.refine == "none"
            and isinstance(self.position, AnchorPosition)
            and self.position.scale is None
        )
        for i, layer in enumerate(self.layers):
            # The layer itself, at its place.
            if i == 0 or not alike:
                where = self.position(i, x, queries, boxes.references, memory)
            around = boxes.references
            x, read = layer(x, where, memory, used)
            last = i == len(self.layers) - 1
            # What the heads say after it.
            wanted = every_layer or last
            heard = wanted or self.scored
            states = x if self.final_norm is None or not heard else self.final_norm(x)
            refined = boxes.step(i, x, states if wanted else None, last=last)
            if heard:
                named = self._normed_twice(states)
                logits = self._logits(heads, i, named, refined)
                if self.ranked is not None and ranks is not None:
                    logits = self.ranked.score(i, logits, ranks)
            if refined is not None and wanted:
                said = self._said(heads, i, withhold(logits, used), refined, states, named)
                if every_layer and isinstance(layer, CrossFirstLayer):
                    said = said._replace(between=Between(read, around))
                outputs.append(said)
            # The queries that the next layer uses.
            if not last and self.distinct is not None:
                assert boxes.references is not None
                used = keep_distinct(segments, logits, boxes.references, self.distinct)
            if not last and self.relation is not None:
                assert around is not None
                assert boxes.references is not None
                used = self.relation.related(used, around, boxes.references)
            if not last and self.ranked is not None:
                ranks = self.ranked.next(logits, segments)
                x = self.ranked.content(i + 1, x, ranks)
        output = stack(outputs)._replace(
            masks=memory.masks, passed=tuple(boxes.passed) if every_layer else ()
        )
        if every_layer and isinstance(boxes, DistributionRefinement):
            return output._replace(initial=boxes.initial())
        return output

    def again(
        self, layer: int, sets: Sequence[Passed], queries: Queries, memory: Memory
    ) -> tuple[DecoderOutput, list[Passed]]:
        """What decoder layer `layer` makes of other `sets` of its queries, which earlier layers
        handed on and which do not see each other: its output of all of them side by side, and what
        it hands on of each.

        Of a decoder whose layers hand on queries and boxes alone. `queries` are those that the
        decoder got.
        """
        count = len(sets)
        x, references, boxes = (joined(parts) for parts in zip(*sets, strict=True))
        assert x is not None
        position = None if queries.position is None else queries.position.repeat(1, count, 1)
        where = self.position(layer, x, Queries(x, position, references), references, memory)
        x, _ = self.layers[layer](x, where, memory, [Segment("again", x.shape[1], copies=count)])
        states = x if self.final_norm is None else self.final_norm(x)
        refinement = IterativeRefinement(self.heads, references, self.refine, self.move)
        refinement.boxes = boxes
        refined = refinement.step(layer, x, states, last=layer == len(self.layers) - 1)
        assert refined is not None
        predicted = (
            self.heads.logits(layer, states),
            refined.boxes,
            states,
            self.heads.iou_logits(layer, states),
        )
        (passed,) = refinement.passed
        rows = [slice(i * x.shape[1] // count, (i + 1) * x.shape[1] // count) for i in range(count)]
        return stack([DecoderOutput(*predicted)]), [
            passed.map(itemgetter((slice(None), part))) for part in rows
        ]

    def say(self, layers: Sequence[Tensor], references: Tensor | None) -> DecoderOutput:
        """What the heads of every layer say of other states `(B, N, D)` of its queries,
        around the `references (L, B, N, 2 or 4)` that it read."""
        outputs = []
        for i, x in enumerate(layers):
            states = x if self.final_norm is None else self.final_norm(x)
            boxes = self.move(
                self.heads.deltas(i, states), None if references is None else references[i]
            )
            outputs.append(
                DecoderOutput(
                    self.heads.logits(i, states), boxes, states, self.heads.iou_logits(i, states)
                )
            )
        return stack(outputs)

    def _of_queries(self, heads: Heads | SegmentHeads, queries: Queries) -> DecoderOutput:
        """The output of the queries as they come."""
        assert queries.boxes is not None, "queries without boxes give no output"
        states = queries.content if self.final_norm is None else self.final_norm(queries.content)
        predicted = heads.logits(0, states), queries.boxes, states, heads.iou_logits(0, states)
        return DecoderOutput(*predicted, mask_embeds=heads.mask_embeds(states))

    def _normed_twice(self, states: Tensor) -> Tensor:
        """What class and mask heads read of the `states (B, N, D)`,
        which are normalised once more where `double_norm` says so.
        """
        if self.final_norm is None or not self.double_norm:
            return states
        normed: Tensor = self.final_norm(states)
        return normed

    def _said(
        self,
        heads: Heads | SegmentHeads,
        layer: int,
        logits: Tensor,
        refined: Refined,
        states: Tensor,
        named: Tensor,
    ) -> DecoderOutput:
        """The output after a layer: class `logits (B, N, C)`, boxes, and what the other heads say
        of the `states (B, N, D)`, masks of the `named (B, N, D)`.
        """
        predicted = logits, refined.boxes, states, heads.iou_logits(layer, states)
        embeds = heads.mask_embeds(named)
        return DecoderOutput(*predicted, mask_embeds=embeds, sides=refined.sides)

    def _logits(
        self, heads: Heads | SegmentHeads, layer: int, states: Tensor, refined: Refined | None
    ) -> Tensor:
        """Class logits `(B, N, C)` after a layer,
        with the quality of the boxes' distributions where there are any.
        """
        logits = heads.logits(layer, states)
        if refined is None or refined.sides is None:
            return logits
        return logits + heads.quality(layer, refined.sides.logits)

    def _refinement(
        self, heads: Heads | SegmentHeads, boxes: Tensor | None
    ) -> IterativeRefinement | DistributionRefinement:
        """How the heads refine the queries' `boxes` in one pass."""
        if self.heads.bins is None:
            return IterativeRefinement(heads, boxes, self.refine, self.move)
        assert boxes is not None, "distributions are refined around boxes"
        return DistributionRefinement(heads, boxes, self.heads.bins, self.eps)


def stack(layers: Sequence[DecoderOutput]) -> DecoderOutput:
    """The outputs of all layers, each without the dimension `L`, as one."""

    def stacked(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.stack(present) if present else None

    sides = [output.sides for output in layers if output.sides is not None]
    between = [output.between for output in layers if output.between is not None]
    return DecoderOutput(
        torch.stack([output.logits for output in layers]),
        torch.stack([output.boxes for output in layers]),
        torch.stack([output.states for output in layers]),
        stacked([output.iou_logits for output in layers]),
        mask_embeds=stacked([output.mask_embeds for output in layers]),
        masks=layers[0].masks,
        sides=stacked_sides(sides) if sides else None,
        between=stacked_between(between) if between else None,
    )


def stacked_sides(layers: Sequence[SideDistributions]) -> SideDistributions:
    """The distributions of all layers, each without the dimension `L`, as one."""
    logits = torch.stack([side.logits for side in layers])
    base = torch.stack([side.base for side in layers])
    return layers[0]._replace(logits=logits, base=base)


def stacked_between(layers: Sequence[Between]) -> Between:
    """The streams of all layers, each without the dimension `L`, as one."""
    references = [layer.references for layer in layers if layer.references is not None]
    states = torch.stack([layer.states for layer in layers])
    return Between(states, torch.stack(references) if references else None)
