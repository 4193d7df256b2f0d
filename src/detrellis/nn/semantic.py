"""Semantic-aligned matching (Zhang et al.: SAM-DETR, CVPR 2022, section 3; SAM-DETR++).

Before cross-attention each query is sampled anew from the encoded features inside its reference
box, so that queries and memory are compared in one space: one salient point for each head, with the
feature found there as the head's content, and the point's sine embedding as its position.

| deviation from the released code | why |
| --- | --- |
| RoIAlign once | there twice, for the same result |
| keys are not expanded to the heads, which share them | the same result; a memory of heads times width is never built |
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.nn.attention import merge_heads, split_heads
from detrellis.nn.kernels.grid import grid_sample
from detrellis.nn.kernels.roi import roi_align
from detrellis.nn.mlp import MLP, xavier_linear
from detrellis.nn.position import sine_embed
from detrellis.nn.prior import map_attention
from detrellis.types import Memory, Prior, Spatial, on_device

CELLS = 7  # of a region, along each side
HIDDEN = (256, 512, 512)  # of the MLP that finds the points

Resample = Literal["points", "avg", "max"]


class Aligned(NamedTuple):
    """Queries sampled anew, for `M` heads."""

    content: Tensor  # (B, N, M, D)
    position: Tensor  # (B, N, M, D)
    points: Tensor  # (B, N, M, 2) x, y in [0, 1] of the unpadded image
    scale: Tensor | None  # (B, N, M, 2) of the prior


class SemanticAligner(nn.Module):
    """Finds salient points in a query's region and samples its contents there.

    There are `keypoints` for each query, shared by neighbouring heads where there are fewer than
    heads. `prior`: also predict how far each head looks around its point (SMCA). For ablation:
    `resample` pools the region instead, `search="image"` looks for points anywhere, `reweight` off
    leaves out the gates that the old query gives, `zero_init` starts with all points in the boxes'
    centres.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        keypoints: int | None = None,
        prior: bool = False,
        resample: Resample = "points",
        search: Literal["box", "image"] = "box",
        reweight: bool = True,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.search, self.resample, self.prior = heads, search, resample, prior
        self.keypoints = keypoints or heads
        self.points = 2 * self.keypoints if resample == "points" else 0
        outputs = self.points + (2 * self.keypoints if prior else 0)
        self.reduce = nn.Conv2d(width, width // 4, 1) if outputs else None
        self.find = _find(CELLS**2 * width // 4, outputs, zero_init=zero_init) if outputs else None
        if self.reduce is not None:
            nn.init.xavier_uniform_(self.reduce.weight)
        self.content_gate = xavier_linear(width, heads * width) if reweight else None
        self.position_gate = xavier_linear(width, heads * width) if reweight else None

    def forward(self, x: Tensor, boxes: Tensor, memory: Memory) -> Aligned:
        """Queries `x (B, N, D)` with reference boxes `(B, N, 4)`, over a memory of one map."""
        # The features inside each box.
        height, width = memory.shapes[0]
        features = memory.tokens.transpose(1, 2).unflatten(2, (height, width))
        ratio = boxes.new_ones(1, 1, 2) if memory.valid_ratios is None else memory.valid_ratios
        regions = region_features(features, boxes, ratio)
        # What an MLP of them predicts: points, then scales of the priors, (B, N, keypoints or twice
        # as many, 2).
        raw = None
        if self.reduce is not None and self.find is not None:
            raw = (
                self.find(self.reduce(regions).relu().flatten(1))
                .view(*x.shape[:2], -1, 2)
                .to(boxes.dtype)
            )
        # Contents there and positions of the points, both gated by the old query.
        content, points = self._resampled(regions, features, boxes, ratio, raw)
        position = sine_embed(points.detach(), x.shape[-1] // 2)
        if self.content_gate is not None and self.position_gate is not None:
            content = content * self.content_gate(x).sigmoid().unflatten(-1, (self.heads, -1))
            position = position * self.position_gate(x).sigmoid().unflatten(-1, (self.heads, -1))
        scale = (
            None
            if raw is None or not self.prior
            else self._each_head(raw[:, :, self.points // 2 :])
        )
        return Aligned(content, position, points, scale)

    def _resampled(
        self, regions: Tensor, features: Tensor, boxes: Tensor, ratio: Tensor, raw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Contents `(B, N, M, D)` sampled at points `(B, N, M, 2)`, or pooled over the region."""
        batch, queries = boxes.shape[:2]
        centre, size = boxes[..., None, :2], boxes[..., None, 2:]
        if self.resample != "points" or raw is None:
            pooled = regions.mean((2, 3)) if self.resample == "avg" else regions.amax((2, 3))
            content = pooled.view(batch, queries, 1, -1).expand(-1, -1, self.heads, -1)
            return content, centre.expand(-1, -1, self.heads, -1)
        predicted = raw[:, :, : self.points // 2]
        if self.search == "image":
            points = predicted.sigmoid()
            sampled = sample(features, 2 * points.flatten(1, 2) * ratio - 1).unflatten(
                1, (queries, -1)
            )
        else:
            inside = predicted.tanh()
            points = centre + inside * size / 2
            sampled = sample(regions, inside.flatten(0, 1)).unflatten(0, (batch, queries))
        return self._each_head(sampled), self._each_head(points)

    def _each_head(self, values: Tensor) -> Tensor:
        """`(B, N, keypoints, d)` to `(B, N, M, d)`:
        head m has keypoint `floor(m keypoints / M)`.
        """
        return values.repeat_interleave(self.heads // self.keypoints, dim=2)


def _find(inputs: int, outputs: int, *, zero_init: bool) -> nn.Sequential:
    widths = (inputs, *HIDDEN, outputs)
    layers = [xavier_linear(a, b) for a, b in pairwise(widths)]
    nn.init.zeros_(layers[-1].bias)
    if zero_init:
        nn.init.zeros_(layers[-1].weight)
    steps = [step for layer in layers for step in (layer, nn.ReLU())]
    return nn.Sequential(*steps[:-1])


def region_features(features: Tensor, boxes: Tensor, ratio: Tensor) -> Tensor:
    """RoIAlign of `features (B, D, H, W)` in boxes `(B, N, 4)` of the unpadded image,
    not clipped: `(B N, D, 7, 7)`, in float32 or better.

    `ratio (B or 1, 1, 2)`: the fraction of the map that is image. Boxes get no gradient.
    """
    height, width = features.shape[-2:]
    scale = (ratio * on_device([width, height], ratio.device, ratio.dtype)).repeat(1, 1, 2)
    batch, queries = boxes.shape[:2]
    corners = (cxcywh_to_xyxy(boxes) * scale).flatten(0, 1)
    image = torch.arange(batch, device=boxes.device).repeat_interleave(queries)
    return roi_align([features], [1], corners, image, torch.zeros_like(image), CELLS).permute(
        0, 3, 1, 2
    )


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of `maps (B, D, H, W)` at `points (B, P, 2)` in [-1, 1], zero outside:
    `(B, P, D)`.
    """
    samples = grid_sample(maps.to(points.dtype), points.unsqueeze(2))
    return samples.squeeze(3).transpose(1, 2)


class SemanticCrossAttention(nn.Module):
    """Cross-attention of aligned queries to one map.
    Every head compares over the full width, with the same keys.

    The residual stream is the old query: the new one only shapes the attention.
    """

    def __init__(
        self, width: int, heads: int, aligner: SemanticAligner, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.aligner = heads, dropout, aligner
        self.query, self.key, self.value = (xavier_linear(width, width) for _ in range(3))
        self.query_position, self.key_position = (
            MLP(width, width, width, 2, xavier=True) for _ in range(2)
        )
        self.output = xavier_linear(width, width)

    def forward(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """What `x (B, N, D)` reads from the memory, `(B, N, D)`, without residual and norm."""
        assert where.references is not None
        aligned = self.aligner(x, where.references, memory)
        attended, _ = self.attend(aligned, memory)
        out: Tensor = self.output(merge_heads(attended))
        return out

    def attend(self, aligned: Aligned, memory: Memory) -> tuple[Tensor, Tensor]:
        """What each head reads `(B, M, N, d)`, and its weights `(B, M, N, S)`."""
        q = (self.query(aligned.content) + self.query_position(aligned.position)).transpose(1, 2)
        k = (self.key(memory.tokens) + self.key_position(memory.position)).unsqueeze(1)
        v = split_heads(self.value(memory.tokens), self.heads)
        prior = None
        if aligned.scale is not None:
            height, width = memory.shapes[0]
            points = aligned.points
            cells = on_device([width, height], points.device, points.dtype)
            cells = (
                cells if memory.valid_ratios is None else cells * memory.valid_ratios.unsqueeze(2)
            )
            prior = Prior(aligned.points * cells, aligned.scale, first=0.5)
        return map_attention(q, k, v, memory, prior, self.dropout if self.training else 0.0)
