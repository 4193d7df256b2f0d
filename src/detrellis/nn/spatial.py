"""Where the decoder's queries look:
their positions at each layer, fixed or derived from the current boxes.

Each module's `forward` takes `(layer, x, queries, boxes, memory)`: the layer's index, its input
`(B, N, D)`, the decoder's queries, and the boxes or points that the layer reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.nn.mlp import MLP
from detrellis.nn.position import sine_embed
from detrellis.types import Memory, Queries, Spatial, on_device

SMALLEST = 1e-6  # a box that collapses must not make the modulation infinite


def position_scale(width: int) -> MLP:
    """The MLP of a content that multiplies its position (Conditional DETR's transformation T)."""
    return MLP(width, width, width, 2, xavier=True)


class FixedPosition(nn.Module):
    """The queries' own positions at every layer (DETR, Deformable DETR)."""

    def forward(
        self, layer: int, x: Tensor, queries: Queries, boxes: Tensor | None, memory: Memory
    ) -> Spatial:
        assert queries.position is not None
        return Spatial(queries.position, boxes)


class ConditionalPosition(nn.Module):
    """The queries' own positions, and the sine embedding of their points times T of the content
    from the second layer on (Conditional DETR, Eq. 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale = position_scale(width)

    def forward(
        self, layer: int, x: Tensor, queries: Queries, boxes: Tensor | None, memory: Memory
    ) -> Spatial:
        assert queries.position is not None
        assert boxes is not None
        sine = sine_embed(boxes[..., :2], self.width // 2)
        return Spatial(queries.position, boxes, sine if layer == 0 else sine * self.scale(x))


class PointPosition(nn.Module):
    """Positions from the centres of the current boxes:
    their sine embedding, without gradient (SAM-DETR).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(
        self, layer: int, x: Tensor, queries: Queries, boxes: Tensor | None, memory: Memory
    ) -> Spatial:
        assert boxes is not None
        return Spatial(sine_embed(boxes[..., :2].detach(), self.width // 2), boxes)


class AnchorPosition(nn.Module):
    """Positions from the current boxes: an MLP on their sine embedding (DINO).

    `scaled`: times T of the content from the second layer on (DAB-Deformable-DETR).
    """

    def __init__(self, width: int, *, scaled: bool = False) -> None:
        super().__init__()
        self.width = width
        self.mlp = MLP(2 * width, width, width, 2, xavier=True)
        self.scale = position_scale(width) if scaled else None

    def forward(
        self, layer: int, x: Tensor, queries: Queries, boxes: Tensor | None, memory: Memory
    ) -> Spatial:
        """The boxes are taken relative to the padded image, as the reference codes do."""
        assert boxes is not None
        padded = boxes
        if memory.valid_ratios is not None:
            padded = boxes * memory.valid_ratios[:, :1].repeat(1, 1, 2)
        position = self.mlp(sine_embed(padded, self.width // 2))
        if self.scale is not None and layer > 0:
            position = position * self.scale(x)
        return Spatial(position, boxes)


class BoxPosition(nn.Module):
    """Positions from the current boxes themselves: an MLP of their four numbers (RT-DETR), within
    `+-limit` where there is one (D-FINE, whose boxes may lie anywhere)."""

    def __init__(self, width: int, limit: float | None = None) -> None:
        super().__init__()
        self.mlp, self.limit = MLP(4, 2 * width, width, 2, xavier=True), limit

    def forward(
        self, layer: int, x: Tensor, queries: Queries, boxes: Tensor | None, memory: Memory
    ) -> Spatial:
        assert boxes is not None
        position = self.mlp(boxes)
        return Spatial(
            position if self.limit is None else position.clamp(-self.limit, self.limit), boxes
        )


@torch.no_grad()
def cells_within(boxes: Tensor, memory: Memory) -> Tensor:
    """Which cells of a memory's levels lie in each box, at least one of each level:
    `(B, N, S)` bool (Cascade-DETR).

    `boxes (B, N, 4)` are relative to the image without its padding.
    """
    corners = cxcywh_to_xyxy(boxes)
    levels = []
    for level, (height, width) in enumerate(memory.shapes):
        size = on_device([width, height], corners.device, corners.dtype)
        size = size.expand(corners.shape[0], 1, 2)
        if memory.valid_ratios is not None:
            size = (size * memory.valid_ratios[:, level : level + 1]).round()
        low = (corners[..., :2] * size).floor().clamp(min=0).minimum(size - 1)
        high = (corners[..., 2:] * size).ceil().clamp(min=1).minimum(size)
        columns, rows = (torch.arange(n, device=boxes.device) for n in (width, height))
        across = (columns >= low[..., :1]) & (columns < high[..., :1])
        down = (rows >= low[..., 1:]) & (rows < high[..., 1:])
        levels.append((down.unsqueeze(-1) & across.unsqueeze(-2)).flatten(2))
    return torch.cat(levels, dim=2)


class ModulatedPosition(nn.Module):
    """DAB-DETR: positions from the current boxes,
    and a spatial query whose attention is as wide and high as the box.

    The sine embedding of the centre is multiplied by T of the content, and its rows and columns by
    the ratio of a size read off the content to the box's own (DAB-DETR, Eq. 6). `within`: queries
    read the cells in their boxes alone.
    """

    def __init__(self, width: int, *, within: bool = False) -> None:
        super().__init__()
        self.width, self.within = width, within
        self.mlp = MLP(2 * width, width, width, 2, xavier=True)
        self.scale = position_scale(width)
        self.size = MLP(width, width, 2, 2, xavier=True)

    def forward(
        self, layer: int, x: Tensor, queries: Queries, boxes: Tensor | None, memory: Memory
    ) -> Spatial:
        assert boxes is not None
        embedded = sine_embed(boxes, self.width // 2)
        sine = embedded[..., : self.width]
        if layer > 0:
            sine = sine * self.scale(x)
        # (w'/w, h'/h); the sine embedding has rows (y) first.
        ratio = (self.size(x).sigmoid() / boxes[..., 2:].clamp(min=SMALLEST)).flip(-1)
        sine = (sine.unflatten(-1, (2, -1)) * ratio.unsqueeze(-1)).flatten(-2)
        readable = cells_within(boxes, memory) if self.within else None
        return Spatial(self.mlp(embedded), boxes, sine, readable=readable)
