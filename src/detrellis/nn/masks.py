"""What masks are read from: a map of stride 4,
and an embedding of each query (Mask2Former, Mask DINO).
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.boxes import inverse_sigmoid, xyxy_to_cxcywh
from detrellis.nn.mlp import MLP
from detrellis.nn.neck import MapNorm
from detrellis.types import ImageBatch, MaskFeatures, Memory, on_device

MaskBox = Literal["mask2box", "bitmask"]  # which end of its last cell a box around a mask has


def _convolution(inputs: int, outputs: int, side: int, *, bias: bool = False) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=bias)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast where the tensor is; torch's meta device knows none."""
    return (
        contextlib.nullcontext()
        if tensor.is_meta
        else torch.autocast(tensor.device.type, enabled=False)
    )


class MaskBranch(nn.Module):
    """One step of a feature pyramid from the memory's finest level, of stride 8, to the backbone's
    map of stride 4, and a projection of that (Mask2Former, section 3.2.1).

    In float32 whatever autocast says: all masks of all layers are products with this one map.
    """

    def __init__(self, channels: int, width: int, outputs: int) -> None:
        super().__init__()
        self.lateral = nn.Sequential(_convolution(channels, width, 1), MapNorm(32, width))
        self.smooth = nn.Sequential(_convolution(width, width, 3), MapNorm(32, width), nn.ReLU())
        self.project = _convolution(width, outputs, 1, bias=True)

    def forward(self, fine: Tensor, memory: Memory, images: ImageBatch) -> MaskFeatures:
        """The features of all masks,
        from the map `fine (B, C, h, w)` of stride 4 and the encoded memory.
        """
        with full_precision(fine):
            lateral = self.lateral(fine.to(self.project.weight.dtype))
            coarse = level_map(memory, 0).to(lateral.dtype)
            up = F.interpolate(
                coarse, size=lateral.shape[-2:], mode="bilinear", align_corners=False
            )
            features = self.project(self.smooth(lateral + up))
        height, width = images.pixels.shape[-2:]
        return MaskFeatures(features, (height, width), images.padding)


def level_map(memory: Memory, level: int) -> Tensor:
    """The tokens of one level as a map `(B, D, h, w)`."""
    start = sum(h * w for h, w in memory.shapes[:level])
    height, width = memory.shapes[level]
    tokens = memory.tokens[:, start : start + height * width].transpose(1, 2)
    return tokens.view(*tokens.shape[:2], height, width)


def mask_embed(width: int, outputs: int) -> MLP:
    """The MLP that makes a query's embedding: what the features are multiplied with."""
    return MLP(width, width, outputs, 3)


@torch.no_grad()
def boxes_around_masks(
    embeds: Tensor, masks: MaskFeatures, kind: MaskBox, eps: float = 1e-5
) -> Tensor:
    """Boxes `(B, N, 4)` around the masks of `embeds (B, N, Dm)`, as the features' cells show them.

    `"bitmask"` ends with the last cell, and is 0 of an empty mask; `"mask2box"` ends where the last
    cell begins, and is a point in the last corner of an empty mask. Sides are at least `eps`.
    """
    with full_precision(embeds):
        features = masks.map.to(torch.promote_types(masks.map.dtype, torch.float32))
        # An image at a time: the masks of all queries are large.
        inside = [
            torch.einsum("nd,dhw->nhw", e.to(f), f) > 0
            for e, f in zip(embeds, features, strict=True)
        ]
    if masks.padding is not None:  # where there is nothing to surround
        hidden = F.interpolate(
            masks.padding[:, None].to(features), size=features.shape[-2:], mode="nearest"
        ).bool()
        inside = [mask & ~cells for mask, cells in zip(inside, hidden, strict=True)]
    # (B, N, w), (B, N, h)
    lines = [torch.stack([mask.any(dim) for mask in inside]) for dim in (1, 2)]
    first = torch.stack([line.int().argmax(-1) for line in lines], dim=-1)
    last = torch.stack([line.shape[-1] - line.flip(-1).int().argmax(-1) for line in lines], dim=-1)
    empty = ~lines[0].any(-1)[..., None]
    sides = [line.shape[-1] for line in lines]
    cells = on_device(sides, features.device, features.dtype)
    if masks.padding is not None:  # to the image without it
        parts = [
            (~masks.padding[:, 0]).to(cells).mean(1),
            (~masks.padding[:, :, 0]).to(cells).mean(1),
        ]
        cells = cells * torch.stack(parts, dim=-1).unsqueeze(1)
    corners = torch.cat([first, last - int(kind == "mask2box")], dim=-1) / cells.repeat(
        *[1] * (cells.dim() - 1), 2
    )
    boxes = xyxy_to_cxcywh(corners.clamp(0, 1))
    none = [1.0, 1.0, 0.0, 0.0] if kind == "mask2box" else [0.0] * 4
    nothing = on_device(none, boxes.device, boxes.dtype)
    return inverse_sigmoid(boxes.where(~empty, nothing), eps).sigmoid()
