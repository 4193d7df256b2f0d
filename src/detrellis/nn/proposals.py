"""Two-stage proposals: every memory token scores the classes and proposes one box (Deformable DETR,
appendix A.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from detrellis.boxes import relative_boxes
from detrellis.nn.constants import kept
from detrellis.nn.distinct import POOL, overlapping
from detrellis.nn.encoder import Shapes, cell_centres, token_centres
from detrellis.nn.heads import box_head, class_head, joined
from detrellis.nn.masks import mask_embed
from detrellis.nn.mlp import xavier_linear
from detrellis.nn.order import behind
from detrellis.types import DecoderOutput, Memory, Proposals

BASE_SIZE = 0.05  # side of a proposal on the finest level; it doubles with each level
APART = 4096.0  # cells from one level to the next, where all lie in one plane
BORDER = 0.01  # a proposal whose centre or size comes closer than this to 0 or 1 is invalid


def select(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index (B, N)` of `values (B, S, d)`: `(B, N, d)`."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def anchor_logits(memory: Memory, *, reverse: bool = False) -> Tensor:
    """Logits of one square proposal a token `(B or 1, S, 4)`, +inf where it is not usable;
    `reverse`: the smallest are the coarsest level's."""
    place = (memory.shapes, memory.position.dtype, memory.tokens.device, reverse)
    if memory.padding is None and memory.valid_ratios is None:
        return unpadded_logits(*place)
    centres = token_centres(memory)
    return _logits(
        torch.cat([centres, token_sides(*place).expand_as(centres)], dim=-1), memory.padding
    )


@kept(16)
def unpadded_logits(
    shapes: Shapes, dtype: torch.dtype, device: torch.device, reverse: bool
) -> Tensor:
    """`anchor_logits` of images without padding, `(1, S, 4)`."""
    centres = cell_centres(shapes, dtype, device)
    sides = token_sides(shapes, dtype, device, reverse)
    return _logits(torch.cat([centres, sides], dim=-1), None)


@kept(64)
def token_sides(shapes: Shapes, dtype: torch.dtype, device: torch.device, reverse: bool) -> Tensor:
    """Width and height of every token's proposal, `(1, S, 2)`."""
    powers = reversed(range(len(shapes))) if reverse else range(len(shapes))
    sides = [BASE_SIZE * 2.0**p for p in powers]
    grids = [
        torch.full((h * w, 2), s, dtype=dtype, device=device)
        for s, (h, w) in zip(sides, shapes, strict=True)
    ]
    return torch.cat(grids)[None]


def _logits(boxes: Tensor, padding: Tensor | None) -> Tensor:
    usable = ((boxes > BORDER) & (boxes < 1 - BORDER)).all(-1)
    if padding is not None:
        usable = usable & ~padding
    safe = torch.where(usable.unsqueeze(-1), boxes, 0.5)
    return torch.log(safe / (1 - safe)).masked_fill(~usable.unsqueeze(-1), math.inf)


def cell_boxes(memory: Memory) -> Tensor:
    """A box of two cells' sides around each token `(1, S, 4)`, counted in cells;
    levels lie far apart.
    """
    device, dtype = memory.tokens.device, memory.position.dtype
    levels = []
    for level, (height, width) in enumerate(memory.shapes):
        y, x = (torch.arange(n, device=device, dtype=dtype) for n in (height, width))
        centres = torch.cartesian_prod(y, x + APART * level).flip(-1)
        levels.append(torch.cat([centres, torch.full_like(centres, 2.0)], dim=-1))
    return torch.cat(levels).unsqueeze(0)


def side_by_side(parts: Sequence[Proposals]) -> Proposals:
    """The first of `parts` with what all of them select, one after the other:
    for queries of several groups.
    """
    best, selected, boxes = (
        torch.cat(values, dim=1) for values in zip(*(p[4:7] for p in parts), strict=True)
    )
    embeds = joined([part.mask_embeds for part in parts])
    return parts[0]._replace(best=best, selected=selected, boxes=boxes, mask_embeds=embeds)


class ProposalHead(nn.Module):
    """Scores of all tokens, the ranking of the best, and the boxes of those.

    `rank_by`: the logit of class 0, which a two-stage Deformable DETR trains as objectness, or the
    highest class logit, as DINO does. `empty_compete`: tokens that can propose nothing are ranked
    by the score of an empty memory, as in the reference codes, instead of last. `distinct`:
    proposals whose IoU with a better one exceeds this are selected last (DDQ); None: off.
    `by_cells`: the IoU is that of boxes of two cells around the tokens, of one level
    (Salience-DETR). `relative`: boxes are moved relative to their size, instead of in logit space
    (LW-DETR). `masks`: the selected also learn masks, by embeddings of that width; `masks_first`:
    which already the queries need. `output_norm`: what the selected learn is read off states that
    are normalised once more, `reverse`: the smallest boxes are the coarsest level's (both Mask
    DINO).
    """

    def __init__(
        self,
        width: int,
        classes: int,
        proposals: int,
        *,
        rank_by: Literal["first", "max"],
        empty_compete: bool = False,
        distinct: float | None = None,
        by_cells: bool = False,
        relative: bool = False,
        masks: int | None = None,
        masks_first: bool = False,
        output_norm: bool = False,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        self.proposals, self.rank_by, self.empty_compete = proposals, rank_by, empty_compete
        self.distinct, self.relative, self.reverse = distinct, relative, reverse
        self.by_cells = by_cells and distinct is not None
        self.projection = xavier_linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.classify = class_head(width, classes)
        self.move = box_head(width)
        self.embed = None if masks is None else mask_embed(width, masks)
        self.masks_first = masks_first
        self.output_norm = nn.LayerNorm(width) if output_norm else nn.Identity()

    def forward(self, memory: Memory) -> Proposals:
        """The proposals; a token that can propose nothing has memory 0."""
        anchors = anchor_logits(memory, reverse=self.reverse).expand(memory.tokens.shape[0], -1, -1)
        empty = anchors[..., :1].isinf()
        states = self._states(memory, empty)
        logits = self.classify(states)
        scores = (logits[..., 0] if self.rank_by == "first" else logits.amax(-1)).detach()
        if not self.empty_compete:
            # An untrained head may rank an empty memory first; how much an image is padded would
            # then decide its queries. A trained one has learned that it is no object.
            scores = scores.masked_fill(empty.squeeze(-1), -math.inf)
        nothing = scores.new_empty(0)
        cells = cell_boxes(memory).expand_as(anchors) if self.by_cells else None
        proposals = Proposals(
            states, anchors, logits, scores, nothing, nothing, nothing, cells=cells
        )
        return self._chosen(proposals, proposals.ranked(self._pool(self.proposals)), self.proposals)

    def states(self, memory: Memory) -> Tensor:
        """What the heads would read `(B, S, D)` of a memory whose positions are part of its
        tokens.
        """
        return self._states(memory, anchor_logits(memory, reverse=self.reverse)[..., :1].isinf())

    def _states(self, memory: Memory, empty: Tensor) -> Tensor:
        states: Tensor = self.norm(self.projection(memory.tokens.masked_fill(empty, 0)))
        return states

    def further(self, proposals: Proposals, count: int, copies: int = 1) -> Proposals:
        """The best `copies * N` of those that are not selected, as if they were;
        the copies choose in turns.

        N is `count`, and less where there are not so many tokens.
        """
        tokens = proposals.rest(copies * self._pool(count))
        each = tokens.shape[1] // copies
        turns = tokens[:, : copies * each].unflatten(1, (each, copies)).unbind(-1)
        return side_by_side([self._chosen(proposals, turn, count) for turn in turns])

    def _pool(self, count: int) -> int:
        """How many proposals `count` queries are chosen from."""
        return count if self.distinct is None else POOL * count

    def _chosen(self, proposals: Proposals, tokens: Tensor, count: int) -> Proposals:
        """The first `count` of the `tokens (B, N)`, best first, as the selected;
        what is not distinct comes last.
        """
        states = select(proposals.states, tokens)
        boxes = self._moved(states, select(proposals.anchors, tokens))
        if self.distinct is not None:
            around = boxes if proposals.cells is None else select(proposals.cells, tokens)
            last = overlapping(around, self.distinct) | proposals.scores.gather(1, tokens).isinf()
            order = behind(last)[:, :count]
            tokens = tokens.gather(1, order)
            states = select(states, order)
            boxes = select(boxes, order)
        embeds = self._mask_embeds(states) if self.masks_first else None
        return proposals._replace(best=tokens, selected=states, boxes=boxes, mask_embeds=embeds)

    def _mask_embeds(self, states: Tensor) -> Tensor | None:
        return None if self.embed is None else self.embed(self.output_norm(states))

    def boxes(self, proposals: Proposals) -> Tensor:
        """Boxes of all tokens `(B, S, 4)`. Few are ever needed."""
        return self._moved(proposals.states, proposals.anchors)

    def _moved(self, states: Tensor, anchors: Tensor) -> Tensor:
        moved: Tensor = self.move(states)
        if self.relative:
            return relative_boxes(moved, anchors.sigmoid().masked_fill(anchors.isinf(), 0))
        return (moved + anchors).sigmoid()

    def training_output(self, proposals: Proposals) -> DecoderOutput:
        """What the loss sees, as an output of one layer:
        all tokens with `rank_by="first"`, else the selected ones.
        """
        if self.rank_by == "first":
            logits, boxes = proposals.logits, self.boxes(proposals)
            return DecoderOutput(logits[None], boxes[None], boxes[None])
        normed = not isinstance(self.output_norm, nn.Identity)
        named = self.classify(self.output_norm(proposals.selected)) if normed else None
        logits = select(proposals.logits, proposals.best) if named is None else named
        boxes = proposals.boxes
        embeds = (
            proposals.mask_embeds if self.masks_first else self._mask_embeds(proposals.selected)
        )
        output = DecoderOutput(logits[None], boxes[None], boxes[None])
        return output if embeds is None else output._replace(mask_embeds=embeds[None])
