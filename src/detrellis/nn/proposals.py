"""Two-stage proposals: every memory token scores the classes and proposes one box (Deformable DETR, appendix A.4)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from detrellis.nn.encoder import token_centres
from detrellis.nn.heads import box_head, class_head
from detrellis.nn.mlp import xavier_linear
from detrellis.types import Memory, Proposals

BASE_SIZE = 0.05  # side of a proposal on the finest level; it doubles with each level
BORDER = 0.01  # a proposal whose centre or size comes closer than this to 0 or 1 is invalid


def anchor_logits(memory: Memory) -> tuple[Tensor, Tensor]:
    """Logits of one square proposal a token `(B or 1, S, 4)`, and which are usable `(B or 1, S)`."""
    centres = token_centres(memory)
    sides = [centres.new_full((h * w, 2), BASE_SIZE * 2.0**level) for level, (h, w) in enumerate(memory.shapes)]
    boxes = torch.cat([centres, torch.cat(sides).expand_as(centres)], dim=-1)
    usable = ((boxes > BORDER) & (boxes < 1 - BORDER)).all(-1)
    if memory.padding is not None:
        usable = usable & ~memory.padding
    safe = torch.where(usable.unsqueeze(-1), boxes, 0.5)
    return torch.log(safe / (1 - safe)), usable


class ProposalHead(nn.Module):
    """Scores and boxes of all tokens, and the ranking of the best.

    `rank_by`: the logit of class 0, which a two-stage Deformable DETR trains as objectness, or the highest class
    logit, as DINO does. `empty_compete`: tokens that can propose nothing are ranked by the score of an empty memory, as
    in the reference codes, instead of last.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        proposals: int,
        *,
        rank_by: Literal["first", "max"],
        empty_compete: bool = False,
    ) -> None:
        super().__init__()
        self.proposals, self.rank_by, self.empty_compete = proposals, rank_by, empty_compete
        self.projection = xavier_linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.classify = class_head(width, classes)
        self.move = box_head(width)

    def forward(self, memory: Memory) -> Proposals:
        """All tokens' logits and boxes, invalid tokens with memory 0 and box 1, and the ranked best."""
        anchors, usable = anchor_logits(memory)
        usable = usable.unsqueeze(-1)
        states = self.norm(self.projection(memory.tokens.masked_fill(~usable, 0)))
        logits = self.classify(states)
        boxes = (self.move(states) + anchors).sigmoid().masked_fill(~usable, 1)
        scores = logits[..., 0] if self.rank_by == "first" else logits.amax(-1)
        if not self.empty_compete:
            # An untrained head may rank an empty memory first; how much an image is padded would then decide its
            # queries. A trained one has learned that it is no object.
            scores = scores.masked_fill(~usable.squeeze(-1), -math.inf)
        proposals = Proposals(logits, boxes, scores.detach(), scores.new_empty(0))
        return proposals._replace(best=proposals.ranked(0, self.proposals))
