"""Position relation (Relation-DETR, Hou et al., ECCV 2024, section 4.1):
how boxes lie to each other, as a bias.

From the decoder's second layer on, self-attention gets a bias for each pair of queries, read off
their boxes: those of the query as they were before the layer before, those that it looks at as that
layer moved them. So a query can find others on the same object whatever they contain. One embedding
serves all layers.

| deviation from the released code | why |
| --- | --- |
| blocks that learn one-to-many by themselves have no bias | there one such branch goes through a pass of its own |
| what the bias is computed from is computed again for the gradient | it is 8 times as large as the bias itself |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detrellis.nn.position import sine_features
from detrellis.types import Segment

FEATURES = 16  # sines and cosines of each of four numbers
SCALE = 100.0  # that they are multiplied by
EPS = 1e-5  # a side that is added to every box's


def box_relation(rows: Tensor, columns: Tensor) -> Tensor:
    """Four logarithms `(B, N, M, 4)` of boxes `rows (B, N, 4)` and `columns (B, M, 4)` (Eq. 4).

    Of how far their centres lie apart, in sides of the row's box, and of how their sides compare.
    """
    rows, columns = rows.unsqueeze(2), columns.unsqueeze(1)
    sides = rows[..., 2:] + EPS
    apart = ((rows[..., :2] - columns[..., :2]).abs() / sides + 1).log()
    return torch.cat([apart, (sides / (columns[..., 2:] + EPS)).log()], dim=-1)


class PositionRelation(nn.Module):
    """The bias of each head: a projection of sines and cosines of `box_relation`,
    where it is positive (Eq. 3).
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.projection = nn.Linear(4 * FEATURES, heads)

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`(B, heads, N, M)` of boxes `rows (B, N, 4)` and `columns (B, M, 4)`."""
        if not torch.is_grad_enabled():
            return self.bias(rows, columns)
        out: Tensor = checkpoint(
            self.bias, rows, columns, use_reentrant=False, preserve_rng_state=False
        )
        return out

    def bias(self, rows: Tensor, columns: Tensor) -> Tensor:
        """As `forward`, with all that is computed on the way kept for the gradient."""
        features = sine_features(box_relation(rows, columns) * SCALE, FEATURES).flatten(-2)
        out: Tensor = self.projection(features).relu()
        return out.movedim(-1, 1)

    def related(self, segments: Sequence[Segment], before: Tensor, after: Tensor) -> list[Segment]:
        """The segments with the bias of their queries,
        whose boxes were `before (B, N, 4)` and are `after`.

        Those that may have several queries for a target, and see no others, stay as they are.
        """
        sizes = [segment.size for segment in segments]
        old = [part.detach() for part in before.split(sizes, dim=1)]
        new = dict(zip((s.name for s in segments), after.detach().split(sizes, dim=1), strict=True))
        related = []
        for segment, rows in zip(segments, old, strict=True):
            seen = [new[name] for name in segment.sees if name in new]
            if seen:
                bias = self(rows, torch.cat([new[segment.name], *seen], dim=1))
            elif segment.repeats:
                related.append(segment)
                continue
            else:
                each = (-1, segment.size // segment.copies, 4)
                bias = self(rows.reshape(each), new[segment.name].reshape(each))
            related.append(segment._replace(bias=bias))
        return related
