"""Mask2Former's decoder (Cheng et al., CVPR 2022):
a query reads only where its mask of the layer before lies.

Its queries are learned, have no place, and predict a mask and a class, no box. What a query may
read of a level is its mask at the level's size. Resizing is linear, so that the features are
resized, once for each level, and no mask ever is: the mask of a query is a product of its embedding
with them.

| deviation from the released code | why |
| --- | --- |
| padding is read by nobody | there padding is read as if it were image, which is square in its recipes |
| the encoder runs under autocast like all of ours, the mask features do not | speed; there the encoder does neither |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.nn.decoder import CrossFirstLayer, stack
from detrellis.nn.masks import full_precision, mask_embed
from detrellis.nn.mlp import MLP
from detrellis.nn.position import SineMap
from detrellis.types import DecoderOutput, MaskFeatures, Memory, Queries, Segment, Spatial


class MaskHeads(nn.Module):
    """Class and mask heads, shared by all layers; one class more is "no object"."""

    def __init__(self, width: int, classes: int, embedding: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, classes + 1)
        self.embed: MLP = mask_embed(width, embedding)


class MaskedDecoder(nn.Module):
    """The layers, each of which reads one level of the memory, coarse to fine and again.

    The queries give outputs before the first layer too, so that there is one more than there are
    layers. A memory of `memory_width` is projected to `width` where the two differ, and where
    `project` asks for it.
    """

    def __init__(
        self,
        layers: Sequence[CrossFirstLayer],
        heads: MaskHeads,
        *,
        levels: int,
        width: int,
        memory_width: int,
        position: SineMap,
        project: bool = False,
    ) -> None:
        super().__init__()
        self.layers, self.heads, self.position = nn.ModuleList(layers), heads, position
        self.final_norm = nn.LayerNorm(width)
        self.projections = nn.ModuleList(
            _projection(memory_width, width) if project or memory_width != width else nn.Identity()
            for _ in range(levels)
        )
        self.level_embed = nn.Parameter(torch.empty(levels, width).normal_())

    def forward(
        self, queries: Queries, memory: Memory, segments: Sequence[Segment], *, every_layer: bool
    ) -> DecoderOutput:
        """Outputs of the queries as they come and after every layer, or after the last one only."""
        assert memory.masks is not None, "a masked decoder needs mask features"
        assert queries.position is not None
        levels = self.levels(memory, memory.masks)
        x = queries.content
        outputs: list[DecoderOutput] = []
        for i in range(len(self.layers) + 1):
            # What the heads say of the queries as they are.
            states = self.final_norm(x)
            embeds = self.heads.embed(states)
            if every_layer or i == len(self.layers):
                nowhere = states.new_zeros(*states.shape[:2], 0)
                outputs.append(
                    DecoderOutput(self.heads.classify(states), nowhere, states, mask_embeds=embeds)
                )
            if i == len(self.layers):
                break
            # The next layer, within those masks.
            level, features = levels[i % len(levels)]
            where = Spatial(queries.position, readable=readable(embeds, features, level.padding))
            x, _ = self.layers[i](x, where, level, segments)
        return stack(outputs)._replace(masks=memory.masks)

    @property
    def outputs(self) -> int:
        """Outputs that it gives in training."""
        return len(self.layers) + 1

    def levels(self, memory: Memory, masks: MaskFeatures) -> list[tuple[Memory, Tensor]]:
        """Each level of the memory, coarsest first,
        and the mask features `(B, Dm, S)` at its size.
        """
        sizes = [height * width for height, width in memory.shapes]
        tokens = memory.tokens.split(sizes, dim=1)
        padding = (
            [None] * len(sizes) if memory.padding is None else memory.padding.split(sizes, dim=1)
        )
        levels = []
        for i in reversed(range(len(sizes))):
            shape, hidden = memory.shapes[i], padding[i]
            valid = tokens[i].new_ones(1, *shape) if hidden is None else ~hidden.unflatten(1, shape)
            position = self.position(valid.to(torch.promote_types(tokens[i].dtype, torch.float32)))
            content = self.projections[i](tokens[i]) + self.level_embed[i]
            with torch.no_grad(), full_precision(content):
                features = F.interpolate(
                    masks.map, size=shape, mode="bilinear", align_corners=False
                ).flatten(2)
            levels.append((Memory(content, position, (shape,), hidden), features))
        return levels


def _projection(inputs: int, width: int) -> nn.Linear:
    layer = nn.Linear(inputs, width)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def readable(embeds: Tensor, features: Tensor, padding: Tensor | None) -> Tensor:
    """Which cells each query may read, `(B, N, S)` bool:
    those of its mask, or all where its mask is empty.

    `embeds (B, N, Dm)`, `features (B, Dm, S)` of the level; never `padding (B, S)`. Computed in
    float32 or better.
    """
    with full_precision(embeds):
        inside = embeds.to(features.dtype) @ features >= 0
    if padding is not None:
        inside &= ~padding.unsqueeze(1)
    empty = ~inside.any(-1, keepdim=True)
    everything = empty if padding is None else empty & ~padding.unsqueeze(1)
    return inside | everything
