"""Rank-DETR's rank layers (Pu et al., NeurIPS 2023, section 3.2):
queries know how they rank by score.

Before each decoder layer from the second on, a query's content takes in a learned row of its rank
among all, by the layer before; and each layer adds to the class logits a learned row of that rank.
So a query that ranks low can learn to stay low, and one that ranks high to stay apart.

| deviation from the released code | why |
| --- | --- |
| queries keep their places and look their rows up; there they are sorted | attention sees no order, known pairs do |
| each copy of a block is ranked by itself, and ranks beyond the table have its last row | denoising and groups too |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detrellis.nn.mlp import xavier_linear
from detrellis.nn.order import best_first
from detrellis.types import Segment


def ranks_of(logits: Tensor, segments: Sequence[Segment], ranks: int) -> Tensor:
    """The rank `(B, N)` of each query by its best class in `logits (B, N, C)`,
    0 the best, in its copy of its segment.

    Ties keep their order; no rank is `most` or more.
    """
    scores, places = logits.detach().amax(-1), []
    for segment, part in zip(
        segments, scores.split([s.size for s in segments], dim=1), strict=True
    ):
        copies = part.reshape(-1, segment.size // segment.copies)
        order = best_first(copies)
        places.append(order.argsort(dim=1).reshape(part.shape))
    return torch.cat(places, dim=1).clamp(max=ranks - 1)


def places_of(segments: Sequence[Segment], ranks: int, device: torch.device) -> Tensor:
    """The place `(1, N)` of each query in its copy, below `most`:
    its rank before there are scores.
    """
    sizes = [segment.size // segment.copies for segment in segments for _ in range(segment.copies)]
    return (
        torch.cat([torch.arange(size, device=device) for size in sizes])
        .clamp(max=ranks - 1)
        .unsqueeze(0)
    )


class RankLayers(nn.Module):
    """Tables of rows by rank, one a layer:
    of contents from the second layer on, and of class logits.
    """

    def __init__(self, layers: int, queries: int, width: int, classes: int) -> None:
        super().__init__()
        self.queries = queries
        self.logits = nn.ParameterList(
            nn.Parameter(torch.zeros(queries, classes)) for _ in range(layers)
        )
        self.contents = nn.ParameterList(
            nn.Parameter(torch.zeros(queries, width)) for _ in range(layers - 1)
        )
        self.embed = nn.ModuleList(xavier_linear(width, width) for _ in range(layers - 1))
        self.mix = nn.ModuleList(xavier_linear(2 * width, width) for _ in range(layers - 1))

    def first(self, segments: Sequence[Segment], device: torch.device) -> Tensor:
        """Ranks before there are scores: `(1, N)`."""
        return places_of(segments, self.queries, device)

    def next(self, logits: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Ranks by the scores of a layer: `(B, N)`."""
        return ranks_of(logits, segments, self.queries)

    def content(self, layer: int, x: Tensor, ranks: Tensor) -> Tensor:
        """The queries `x (B, N, D)` before decoder layer `layer`, from the second on."""
        rows = self.embed[layer - 1](self.contents[layer - 1])[ranks].expand_as(x)
        out: Tensor = self.mix[layer - 1](torch.cat([x, rows], dim=-1))
        return out

    def score(self, layer: int, logits: Tensor, ranks: Tensor) -> Tensor:
        """The class logits `(B, N, C)` after decoder layer `layer`,
        whose queries had these ranks.
        """
        out: Tensor = logits + self.logits[layer][ranks]
        return out
