"""Where the decoder's queries come from: learned, from proposals, or mixed (learned content, proposed boxes)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrellis.nn.mlp import xavier_linear
from detrellis.nn.position import sine_embed
from detrellis.nn.proposals import ProposalHead
from detrellis.types import Memory, Proposals, Queries


def select(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index (B, N)` of `values (B, S, d)`: `(B, N, d)`."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


class LearnedQueries(nn.Module):
    """One-stage Deformable DETR: a learned position and content; the reference point is read off the position."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(count, width).normal_())
        self.content = nn.Parameter(torch.empty(count, width).normal_())
        self.reference = xavier_linear(width, 2)
        nn.init.zeros_(self.reference.bias)

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """The same queries for every image, and no proposals."""
        batch = (len(memory.tokens), -1, -1)
        points = self.reference(self.position).sigmoid()
        return Queries(self.content.expand(batch), self.position.expand(batch), points.expand(batch)), None


class ProposalQueries(nn.Module):
    """Boxes from the best proposals, detached; position, content or both derived from those boxes.

    Two-stage Deformable DETR derives both. Mixed query selection (`learned_content`) learns the content instead;
    with `derive_position` off, the decoder derives the position from the boxes at each layer (DINO).
    """

    def __init__(
        self, head: ProposalHead, width: int, *, learned_content: bool = True, derive_position: bool = False
    ) -> None:
        super().__init__()
        self.head = head
        self.content = nn.Parameter(torch.empty(head.proposals, width).normal_()) if learned_content else None
        assert learned_content or derive_position, "a content must come from somewhere"
        both = (2 * width, 2 * width)
        self.derive = nn.Sequential(xavier_linear(*both), nn.LayerNorm(2 * width)) if derive_position else None
        self.width = width

    def forward(self, memory: Memory) -> tuple[Queries, Proposals]:
        """The queries and the proposals they came from."""
        proposals = self.head(memory)
        boxes = select(proposals.boxes, proposals.best).detach()
        if self.derive is None:
            return Queries(self._learned(boxes), None, boxes), proposals
        # x, y, w, h in that order: the one place in the family where the sine embedding does not swap.
        position, content = self.derive(sine_embed(boxes, self.width // 2, order="xywh")).chunk(2, dim=-1)
        return Queries(content if self.content is None else self._learned(boxes), position, boxes), proposals

    def _learned(self, boxes: Tensor) -> Tensor:
        assert self.content is not None
        return self.content[: boxes.shape[1]].expand(len(boxes), -1, -1)
