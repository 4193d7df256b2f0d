"""EVA-02's ViT as detectors use it (Fang et al., 2023):
windows, rotary positions, and a gated feed-forward block.

Names of parameters are those of its released checkpoints. Maps are `(B, H, W, D)` inside, a cell
for each patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from detrellis.nn.backbone import Backbone, Frozen, fill_by_name, first_stages, published
from detrellis.nn.pretrained import Source

PATCH = 16
GRID = 16  # rotary positions count as if the map, or the window, had this many cells along a side
BLOCK_EPS = 1e-6


def rotary_table(
    shape: tuple[int, int], channels: int, extent: tuple[int, int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosine and sine `(H * W, channels)` of the angles by which a cell's channels turn, in pairs.

    The first half of a head's `channels` turns with the row, the second with the column, `extent`
    cells (height, width) being `GRID` units. Type and device are those of `like`, the angles
    float32 at least.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=dtype, device=like.device) / half)
    y, x = (
        torch.outer(torch.arange(side, dtype=dtype, device=like.device) * GRID / whole, frequencies)
        for side, whole in zip(shape, extent, strict=True)
    )
    size = (*shape, len(frequencies))
    angles = torch.cat([y[:, None].expand(size), x[None].expand(size)], dim=-1).flatten(0, 1)
    angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotated(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """`x (..., N, channels)`, each pair of neighbouring channels turned by the table's angle."""
    cosine, sine = table
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack([-second, first], dim=-1).flatten(-2) * sine


def resized(table: Tensor, shape: tuple[int, int]) -> Tensor:
    """A table of positions `(1, 1 + n * n, D)` for a map of another shape,
    `(1, 1 + H * W, D)` (bicubic).

    The first row, a class token's, stays as it is.
    """
    side = math.isqrt(table.shape[1] - 1)
    if shape == (side, side):
        return table
    grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    rows = F.interpolate(grid, shape, mode="bicubic").flatten(2).transpose(1, 2)
    return torch.cat([table[:, :1], rows], dim=1)


class EvaAttention(nn.Module):
    """Self-attention with rotary positions; keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, width, bias=False) for _ in range(3)
        )
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """`x (B, N, D)` after attention among its N cells."""
        q, k, v = (
            F.linear(x, layer.weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, bias in (
                (self.q_proj, self.q_bias),
                (self.k_proj, None),
                (self.v_proj, self.v_bias),
            )
        )
        out = F.scaled_dot_product_attention(rotated(q, table), rotated(k, table), v)
        mixed: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return mixed


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020) with a norm before its last layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Linear(width, hidden) for _ in range(2))
        self.ffn_ln = nn.LayerNorm(hidden, eps=BLOCK_EPS)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., D)` to the same shape."""
        out: Tensor = self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))
        return out


class EvaBlock(nn.Module):
    """Attention and feed-forward block, each on normalised input;
    attention within windows where `window` is not 0.
    """

    def __init__(self, width: int, heads: int, window: int, drop_path: float) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=BLOCK_EPS) for _ in range(2))
        self.attn = EvaAttention(width, heads)
        self.mlp = GatedFeedForward(width, width * 8 // 3)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """`x (B, H, W, D)` after the block; `table`: of a window's cells, or of all."""
        attended: Tensor = self.drop_path(self._attended(self.norm1(x), table))
        x = x + attended
        mixed: Tensor = self.drop_path(self.mlp(self.norm2(x)))
        return x + mixed

    def _attended(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        images, height, width, _ = x.shape
        if not self.window:
            whole: Tensor = self.attn(x.flatten(1, 2), table)
            return whole.view_as(x)
        # Windows at the right and at the bottom are filled up with zeros, which attention reads as
        # any other cell.
        w = self.window
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        rows, columns = x.shape[1] // w, x.shape[2] // w
        windows = (
            x.view(images, rows, w, columns, w, -1).transpose(2, 3).reshape(-1, w * w, x.shape[-1])
        )
        out: Tensor = self.attn(windows, table)
        out = out.view(images, rows, columns, w, w, -1).transpose(2, 3)
        return out.reshape(x.shape)[:, :height, :width]


class EvaViT(Backbone):
    """The whole network, for images with any sides, which are padded to whole patches with zeros.

    `global_blocks` read the whole map, counted from 0; the others read windows of `window` cells a
    side. `grid` is the side of the table of positions, which is resized to each map. `extent`:
    cells along a side that rotary positions of whole maps count `GRID` units over (of checkpoints
    that were trained at one size); None: each map's own. `checkpointing`: the backward pass
    computes each block again, which saves its activations. `frozen`: blocks that are not trained,
    with the embedding.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        window: int,
        global_blocks: Collection[int],
        grid: int,
        extent: int | None = None,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        frozen: Frozen = 0,
    ) -> None:
        super().__init__()
        self.window, self.extent, self.checkpointing = window, extent, checkpointing
        self.head, self.channels = width // heads, [width]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        # The first is of the class token
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.blocks = nn.ModuleList(
            EvaBlock(
                width, heads, 0 if i in global_blocks else window, drop_path * i / max(depth - 1, 1)
            )
            for i in range(depth)
        )
        self.out_norm = nn.LayerNorm(width)
        self._initialise()
        if frozen == "all":
            self._freeze([self])
        elif frozen:
            self._freeze(
                [self.patch_embed, *first_stages(list(self.blocks), frozen, "eva02")],
                [self.pos_embed],
            )

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """The one map `(B, D, h, w)` of `pixels (B, 3, H, W)`."""
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % PATCH, 0, -height % PATCH))
        out: Tensor = self.out_norm(self.encoded(self.embedded(pixels)))
        return [out.permute(0, 3, 1, 2)]

    def embedded(self, pixels: Tensor) -> Tensor:
        """The patches with their positions, `(B, h, w, D)`,
        of pixels whose sides are multiples of a patch.
        """
        patches: Tensor = self.patch_embed["proj"](pixels)
        x = patches.permute(0, 2, 3, 1)
        return x + resized(self.pos_embed, (x.shape[1], x.shape[2]))[:, 1:].view(1, *x.shape[1:])

    def encoded(self, x: Tensor) -> Tensor:
        """`x (B, h, w, D)` after all blocks."""
        shape = (x.shape[1], x.shape[2])
        extent = shape if self.extent is None else (self.extent, self.extent)
        window = (self.window, self.window)
        tables = {
            True: rotary_table(window, self.head, window, x),
            False: rotary_table(shape, self.head, extent, x),
        }
        for block in self.blocks:
            table = tables[bool(block.window)]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, table, use_reentrant=False)
            else:
                x = block(x, table)
        return x

    def start_from(self, source: Source, name: str | None) -> None:
        """Load pretrained weights: of the timm model `name`, or a file in EVA-02's names or timm's.

        Patches and positions are resized to this ViT's. `UserError` where something is missing or
        has another shape; a final norm, which EVA-02's detectors lack, may be.
        """
        norm = {
            name: value for name, value in self.state_dict().items() if name.startswith("out_norm.")
        }
        weights = norm | _renamed(published(name, source), self.pos_embed)
        remedy = (
            "Name weights of an EVA-02 of this width and depth: -o detector.backbone.weights=FILE."
        )
        fill_by_name(self, weights, source, "this ViT", remedy)


# Names of timm's EVA-02 and of detectors on EVA-02, and ours.
NAMES = {
    r"^(?:model\.|module\.)*(?:backbone\.)?(?:net\.)?": "",
    r"^norm\.": "out_norm.",
    r"\.([qv])_proj\.bias$": r".\1_bias",
    r"\.mlp\.fc1_g\.": ".mlp.w1.",
    r"\.mlp\.fc1_x\.": ".mlp.w2.",
    r"\.mlp\.norm\.": ".mlp.ffn_ln.",
    r"\.mlp\.fc2\.": ".mlp.w3.",
}


def _renamed(weights: Mapping[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """The weights in our names, with patches of our size, and as many `positions` as here."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        for pattern, ours in NAMES.items():
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    if "patch_embed.proj.weight" in renamed:
        kernel = renamed["patch_embed.proj.weight"]
        if kernel.shape[-1] != PATCH:
            renamed["patch_embed.proj.weight"] = F.interpolate(
                kernel.float(), (PATCH, PATCH), mode="bicubic"
            )
    table = renamed.get("pos_embed")
    if table is not None:
        if math.isqrt(table.shape[1]) ** 2 == table.shape[1]:  # without a class token
            table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        side = math.isqrt(positions.shape[1] - 1)
        # Others do not fit, as will be said
        if math.isqrt(table.shape[1] - 1) ** 2 == table.shape[1] - 1:
            renamed["pos_embed"] = resized(table.float(), (side, side))
    return renamed
