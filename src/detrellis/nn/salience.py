"""An encoder that refines the tokens that matter:
Salience-DETR (Hou et al., CVPR 2024), Focus-DETR (Zheng et al., ICCV 2023).

From the coarsest level to the finest a small network says how salient each token is, told what the
level before said. The best of each level (Salience-DETR), or of all levels (Focus-DETR), are the
encoder's queries, fewer from layer to layer; all tokens, as they were before the encoder, are what
they read. Among those whose class and salience promise most there is dense attention first. What
the last layer does not refine gets a learned background embedding (Salience-DETR).

Salience is read off the states of the proposal head, and promise off its classes: it needs a
two-stage detector. What the tokens learn stands in `detrellis/salience.py`.

| deviation from the released code | why |
| --- | --- |
| each image has its own number of tokens, on each level and in each layer; there the batch's largest | padding |
| what the predictor averages, and how scores are enlarged, ends where the image ends | padding |
| class and salience are multiplied as probabilities; there as logits, of which two low ones make a high one | a slip |
| the background embedding's positions end with the tables; there larger maps are an error | any image |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrellis.nn.attention import SelfAttention
from detrellis.nn.encoder import EncoderLayer, token_centres
from detrellis.nn.kernels.grid import grid_sample
from detrellis.nn.order import best_first
from detrellis.nn.proposals import ProposalHead, select
from detrellis.types import Memory, Segment, Spatial, on_device

PROMISING = 300  # tokens of dense attention
CELLS = 200  # rows and columns of the background embedding


class Kept(NamedTuple):
    """The tokens that are refined, best first."""

    order: Tensor  # (B, K)
    counts: Tensor | None  # (B, 1) how many of them are the image's; None: all


class SaliencePredictor(nn.Module):
    """How salient each token is:
    half of the channels know the token, half the mean over the level.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        inner = (
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
        )
        self.after = nn.Sequential(*inner, nn.Linear(width // 4, 1))

    def forward(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Logits `(B, S)` of a level's tokens `(B, S, D)`, of which `padding (B, S)` are none."""
        local, overall = self.before(tokens).chunk(2, dim=-1)
        if padding is None:
            mean = overall.mean(1, keepdim=True)
        else:
            used = (~padding).unsqueeze(-1).to(overall.dtype)
            mean = (overall * used).sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp(min=1)
        out: Tensor = self.after(torch.cat([local, mean.expand_as(local)], dim=-1))
        return out.squeeze(-1)


class BackgroundEmbedding(nn.Module):
    """A row of one table for each column of a map, beside a row of another for each of its rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.columns, self.rows = (
            nn.Parameter(torch.empty(CELLS, width // 2).uniform_()) for _ in range(2)
        )

    def forward(self, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """`(S, D)` of the tokens of maps of these heights and widths."""
        levels = []
        for height, width in shapes:
            down, across = (
                torch.arange(n, device=self.rows.device).clamp(max=CELLS - 1)
                for n in (height, width)
            )
            rows, columns = self.rows[down].unsqueeze(1), self.columns[across].unsqueeze(0)
            size = (height, width, -1)
            levels.append(
                torch.cat([columns.expand(*size), rows.expand(*size)], dim=-1).flatten(0, 1)
            )
        return torch.cat(levels)


class SalienceEncoder(nn.Module):
    """A stack of layers for the salient tokens.

    `promising`: dense attention for each layer. `level_ratios`: the part of each level's tokens
    that is refined, finest first, the last one of all further levels too; or one number, the part
    of all tokens. `layer_ratios`: the part of those in each layer, likewise.
    """

    def __init__(
        self,
        layers: Sequence[EncoderLayer],
        promising: Sequence[SelfAttention],
        width: int,
        levels: int,
        *,
        level_ratios: Sequence[float] | float,
        layer_ratios: Sequence[float],
        background: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers, self.promising = nn.ModuleList(layers), nn.ModuleList(promising)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        self.dropout = nn.Dropout(dropout)
        self.predictor = SaliencePredictor(width)
        self.alpha = nn.Parameter(torch.empty(levels - 1).uniform_(-0.3, 0.3))
        self.background = BackgroundEmbedding(width) if background else None
        self.level_ratios, self.layer_ratios = level_ratios, list(layer_ratios)

    def forward(self, memory: Memory, head: ProposalHead) -> Memory:
        """The memory with refined tokens, and how salient each is;
        `head` proposes boxes from it later.
        """
        salience = self.score(
            head.states(memory._replace(tokens=memory.tokens + memory.position)), memory
        )
        kept = self.keep(salience.detach(), memory)
        tokens = memory.tokens
        position, centres = (
            t.expand(tokens.shape[0], -1, -1) for t in (memory.position, token_centres(memory))
        )
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, EncoderLayer)
            # The layer's queries, of which those beyond an image's own are computed for nothing.
            ratio = self.layer_ratios[min(i, len(self.layer_ratios) - 1)]
            index = kept.order[:, : max(int(ratio * kept.order.shape[1]), 1)]
            used = (
                None
                if kept.counts is None
                else _first(index, (ratio * kept.counts).floor().clamp(min=1))
            )
            x = select(tokens, index)
            where = Spatial(select(position, index), select(centres, index))
            # Dense attention among the promising ones, then what all of them read.
            promise = (
                head.classify(x).detach().amax(-1).sigmoid()
                * salience.detach().gather(1, index).sigmoid()
            )
            refined = layer.refine(self._mixed(i, x, where.position, promise, used), where, memory)
            if used is not None:
                refined = torch.where(used.unsqueeze(-1), refined, x)
            tokens = tokens.scatter(
                1, index.unsqueeze(-1).expand_as(refined), refined.to(tokens.dtype)
            )
        if self.background is not None:
            left = torch.ones_like(salience, dtype=torch.bool)
            left = left.scatter(
                1, index, torch.zeros_like(index, dtype=torch.bool) if used is None else ~used
            )
            if memory.padding is not None:
                left = left & ~memory.padding
            tokens = tokens + self.background(memory.shapes).to(tokens.dtype) * left.unsqueeze(-1)
        return memory._replace(tokens=tokens, salience=salience)

    def score(self, states: Tensor, memory: Memory) -> Tensor:
        """How salient each token of the `states (B, S, D)` is, as logits `(B, S)`:
        coarse levels first, of which finer ones hear."""
        sizes = [height * width for height, width in memory.shapes]
        padding = (
            [None] * len(sizes) if memory.padding is None else memory.padding.split(sizes, dim=1)
        )
        scores: list[Tensor] = []
        for level in range(len(sizes) - 1, -1, -1):
            x = states.split(sizes, dim=1)[level]
            if scores:
                x = x + x * self.alpha[level] * enlarged(scores[0], level, memory).unsqueeze(-1)
            scores.insert(0, self.predictor(x, padding[level]))
        return torch.cat(scores, dim=1)

    def keep(self, salience: Tensor, memory: Memory) -> Kept:
        """Which tokens are refined, by `salience (B, S)`: the best of each level, or of all."""
        sizes = [height * width for height, width in memory.shapes]
        ratios = self.level_ratios
        if isinstance(ratios, float | int):
            sizes, ratios = [sum(sizes)], [ratios]
        indices, scores, counts = [], [], []
        padding = None if memory.padding is None else memory.padding.split(sizes, dim=1)
        for level, part in enumerate(salience.split(sizes, dim=1)):
            ratio = ratios[min(level, len(ratios) - 1)]
            if padding is not None:
                part = part.masked_fill(padding[level], -torch.inf)
                valid = (~padding[level]).sum(1, keepdim=True)
                counts.append((ratio * valid).floor().clamp(min=1).minimum(valid))
            best = part.topk(max(int(ratio * sizes[level]), 1), dim=1)
            value = best.values
            if counts:
                value = value.masked_fill(~_first(value, counts[-1]), -torch.inf)
            indices.append(best.indices + sum(sizes[:level]))
            scores.append(value)
        order = best_first(torch.cat(scores, dim=1))
        return Kept(
            torch.cat(indices, dim=1).gather(1, order),
            sum(counts[1:], counts[0]) if counts else None,
        )

    def _mixed(
        self, layer: int, x: Tensor, position: Tensor, promise: Tensor, used: Tensor | None
    ) -> Tensor:
        """The tokens `x (B, N, D)` after dense attention among those of the highest
        `promise (B, N)`.
        """
        if used is not None:
            promise = promise.masked_fill(~used, -1)
        index = promise.topk(min(PROMISING, promise.shape[1]), dim=1).indices
        unused = None if used is None else ~used.gather(1, index)
        some, segment = select(x, index), Segment("promising", index.shape[1], unused=unused)
        attended = self.dropout(self.promising[layer](some, select(position, index), [segment]))
        mixed = self.norms[layer](some + attended)
        return x.scatter(1, index.unsqueeze(-1).expand_as(mixed), mixed.to(x.dtype))


def _first(rows: Tensor, counts: Tensor) -> Tensor:
    """The first `counts (B, 1)` of the columns of `rows (B, N)`: `(B, N)` bool."""
    return torch.arange(rows.shape[1], device=rows.device) < counts


def enlarged(scores: Tensor, level: int, memory: Memory) -> Tensor:
    """The `scores (B, S')` of the level after `level` at the tokens of this one, `(B, S)`:
    bilinear, corners on corners of what is no padding."""
    (height, width), (rows, columns) = memory.shapes[level : level + 2]
    pair = [[width, height], [columns, rows]]
    sizes = on_device(pair, scores.device, scores.dtype)[None]
    last = sizes - 1
    if memory.valid_ratios is not None:
        last = ((sizes * memory.valid_ratios[:, level : level + 2]).round() - 1).to(scores.dtype)
    # From cells of this level to cells of the coarser one, none beyond its last; then as
    # `grid_sample` counts them.
    steps = last[:, 1] / last[:, 0].clamp(min=1)  # (B or 1, 2) x, y
    x, y = (torch.arange(n, device=scores.device, dtype=scores.dtype) for n in (width, height))
    x, y = (torch.minimum(c * steps[:, i, None], last[:, 1, i, None]) for i, c in enumerate((x, y)))
    across, down = (2 * c / max(n - 1, 1) - 1 for c, n in ((x, columns), (y, rows)))
    grid = torch.stack(
        [across.unsqueeze(1).expand(-1, height, -1), down.unsqueeze(2).expand(-1, -1, width)],
        dim=-1,
    )
    maps = scores.view(scores.shape[0], 1, rows, columns)
    grid = grid.expand(scores.shape[0], -1, -1, -1)
    return grid_sample(maps, grid, border=True, align_corners=True).flatten(1)
