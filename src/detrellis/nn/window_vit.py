"""A plain ViT whose blocks attend within windows, but for a few: the backbone of LW-DETR (Chen et
al., 2024), as CAE v2 trains it, and of RF-DETR (Robinson et al., 2025), a DINOv2.

The grid of patches is cut into windows once, and its tokens stay ordered by windows through all
blocks: a block over the whole image reads them as one sequence, whose order does not matter to
attention (LW-DETR, section 3.3).

| deviation from the released codes | why |
| --- | --- |
| images are padded with zeros to whole windows, and the maps cut to the image | theirs refuse other sizes |
| a window of a wide or high image is one of rows and columns | RF-DETR's partition swaps them: equal for squares |
| the blocks behind the last tap are not built | they change nothing |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.nn.backbone import Backbone, Frozen, fill_by_name, published
from detrellis.nn.pretrained import Source

EPS = 1e-6  # of all norms


class PatchEmbedding(nn.Module):
    """Tokens of the image's patches,
    with learned positions that are resized to the image's grid (bicubic).
    """

    def __init__(
        self, width: int, patch: int, grid: int, *, class_token: bool, antialias: bool
    ) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, patch, stride=patch)
        # The first row is a class token's, which pretraining has in either case.
        self.positions = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, 1 + grid**2, width), std=0.02)
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.grid, self.antialias = grid, antialias

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens `(B, h, w, C)` of `pixels (B, 3, H, W)`,
        whose sides are multiples of the patch.
        """
        tokens: Tensor = self.projection(pixels).permute(0, 2, 3, 1)
        return tokens + self._resized(tokens.shape[1], tokens.shape[2])

    def prefix(self, count: int) -> Tensor | None:
        """The class token with its position `(count, 1, C)`, where there is one."""
        return (
            None
            if self.class_token is None
            else (self.class_token + self.positions[:, :1]).expand(count, -1, -1)
        )

    def _resized(self, rows: int, columns: int) -> Tensor:
        table: Tensor = self.positions[:, 1:].unflatten(1, (self.grid, self.grid))
        if (rows, columns) == (self.grid, self.grid):
            return table
        maps = table.permute(0, 3, 1, 2).float() if self.antialias else table.permute(0, 3, 1, 2)
        maps = F.interpolate(maps, (rows, columns), mode="bicubic", antialias=self.antialias)
        return maps.permute(0, 2, 3, 1).to(table.dtype)


class WindowViT(Backbone):
    """The maps after some of the blocks, all of the stride of a patch.

    `windows` stand along each side of the image; the blocks `windowed`, counted from 0, attend
    within them. `taps` says after how many blocks a map is read off. `dinov2`: with a class token,
    one copy a window, a norm of every map, and positions resized with antialiasing. `grid`: patches
    along a side of the position table. `frozen`: blocks that are not trained, with the embedding.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        patch: int,
        grid: int,
        windows: int,
        windowed: Sequence[int],
        taps: Sequence[int],
        dinov2: bool,
        drop_path: float = 0.0,
        frozen: Frozen = 0,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block  # only here: timm's import takes a second

        self.embedding = PatchEmbedding(width, patch, grid, class_token=dinov2, antialias=dinov2)
        block: Any = partial(Block, width, heads, qkv_bias=True, init_values=1.0 if dinov2 else 0.1)
        norm, last = partial(nn.LayerNorm, eps=EPS), max(taps) - 1
        rates = [drop_path * i / max(last, 1) for i in range(last + 1)]
        self.blocks = nn.ModuleList(block(drop_path=rate, norm_layer=norm) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=EPS) if dinov2 else None
        self.patch = patch
        self.windows = windows
        self.windowed = frozenset(windowed)
        self.taps = frozenset(taps)
        self.channels = [width] * len(self.taps)
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        if frozen:
            self._freeze([self] if frozen == "all" else [self.embedding, *self.blocks[:frozen]])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps `(B, C, h, w)` of `pixels (B, 3, H, W)`, in the order of the blocks."""
        height, width = pixels.shape[-2:]
        cell = self.patch * self.windows
        x = self.embedding(F.pad(pixels, (0, -width % cell, 0, -height % cell)))
        rows, columns = x.shape[1] // self.windows, x.shape[2] // self.windows
        x = self._split(x)
        maps = []
        for i, block in enumerate(self.blocks):
            x = (
                block(x)
                if i in self.windowed
                else block(x.view(pixels.shape[0], -1, x.shape[-1])).view(x.shape)
            )
            if i + 1 in self.taps:
                joined = self._joined(x, rows, columns)
                maps.append(joined[:, :, : -(-height // self.patch), : -(-width // self.patch)])
        return maps

    def start_from(self, source: Source, name: str | None) -> None:
        """Load pretrained weights: of the timm model `name`,
        or a file in timm's names or those of CAE v2.

        Patches and positions are resized to this ViT's, and later blocks than it has left out.
        `UserError` where something is missing or has another shape.
        """
        remedy = (
            "Name weights of a ViT of this style, width and depth: -o "
            "detector.backbone.weights=FILE."
        )
        fill_by_name(
            self, _renamed(published(name, source), self.embedding), source, "this ViT", remedy
        )

    def _split(self, tokens: Tensor) -> Tensor:
        """`(B, h, w, C)` to windows `(B * windows^2, n, C)`, each with its class token first."""
        count = self.windows
        x = tokens.unflatten(2, (count, -1)).unflatten(1, (count, -1))
        x = x.transpose(2, 3).flatten(3, 4).flatten(0, 2)
        prefix = self.embedding.prefix(x.shape[0])
        return x if prefix is None else torch.cat([prefix, x], dim=1)

    def _joined(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """The inverse of `_split`, `(B, C, h, w)`, for windows of so many rows and columns."""
        x = x[:, -rows * columns :]
        x = (x if self.norm is None else self.norm(x)).unflatten(1, (rows, columns))
        x = x.unflatten(0, (-1, self.windows, self.windows)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


# Names of timm's ViTs and of CAE v2's, and ours.
NAMES = {
    r"^(?:encoder\.)": "",
    r"^patch_embed\.proj\.": "embedding.projection.",
    r"^pos_embed$": "embedding.positions",
    r"^cls_token$": "embedding.class_token",
    r"\.gamma_([12])$": r".ls\1.gamma",
}


def _renamed(weights: Mapping[str, Tensor], embedding: PatchEmbedding) -> dict[str, Tensor]:
    """The weights in our names, with the patches and positions of `embedding`."""
    from timm.layers.patch_embed import resample_patch_embed
    from timm.layers.pos_embed import resample_abs_pos_embed

    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        for pattern, ours in NAMES.items():
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    # CAE v2's keys have no bias, which a softmax does not see.
    for name in [name for name in renamed if name.endswith(".q_bias")]:
        q, v = renamed[name], renamed[name.replace(".q_bias", ".v_bias")]
        renamed[name.replace(".q_bias", ".qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    side = embedding.projection.kernel_size
    if "embedding.projection.weight" in renamed:
        renamed["embedding.projection.weight"] = resample_patch_embed(
            renamed["embedding.projection.weight"], list(side)
        )
    if "embedding.positions" in renamed:
        grid = [embedding.grid, embedding.grid]
        renamed["embedding.positions"] = resample_abs_pos_embed(
            renamed["embedding.positions"], grid
        )
    return renamed
