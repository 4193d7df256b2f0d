"""Classification and box heads, with the initialisation that focal training needs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from detrellis.nn.distribution import Bins, QualityEstimator
from detrellis.nn.masks import mask_embed
from detrellis.nn.mlp import MLP
from detrellis.types import Segment


def class_head(width: int, classes: int) -> nn.Linear:
    """Linear classifier whose bias starts every class at probability 0.01 (the focal loss
    prior).
    """
    layer = nn.Linear(width, classes)
    nn.init.constant_(layer.bias, -math.log(0.99 / 0.01))
    return layer


def box_head(width: int, outputs: int = 4) -> MLP:
    """Three-layer MLP whose deltas, or other `outputs`, start at 0."""
    head = MLP(width, width, outputs, 3)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return head


class Heads(nn.Module):
    """Class and box heads of the decoder layers:
    one of each shared by all layers, or one of each a layer.

    Heads of their own start as copies of each other. `size_bias` is the first box head's initial
    logit shift of width and height: -2 makes small boxes where the references are points.
    `softmax`: DETR's heads, with one logit more for "no object", and PyTorch's initialisation:
    without references a box head has to start somewhere. `iou_branch`: one logit more, which learns
    the IoU of the box with its target (IoU-Net). `bins`: the box heads say the logits of a
    distribution for each side; before them stands a head of the initial box, behind them a quality
    estimator a layer (D-FINE). `masks`: one mask head, of embeddings of that width, for all layers
    (Mask DINO).
    """

    def __init__(
        self,
        width: int,
        classes: int,
        layers: int,
        *,
        shared: bool,
        size_bias: float = 0.0,
        softmax: bool = False,
        iou_branch: bool = False,
        bins: Bins | None = None,
        masks: int | None = None,
    ) -> None:
        super().__init__()
        if softmax:
            of_classes, of_boxes = nn.Linear(width, classes + 1), MLP(width, width, 4, 3)
        else:
            of_classes = class_head(width, classes)
            of_boxes = box_head(width, 4 * (bins.number + 1) if bins else 4)
        of_ious = nn.Linear(width, 1) if iou_branch else None
        copies = range(1 if shared else layers)
        self.classes = nn.ModuleList(copy.deepcopy(of_classes) for _ in copies)
        self.boxes = nn.ModuleList(copy.deepcopy(of_boxes) for _ in copies)
        self.ious = (
            None if of_ious is None else nn.ModuleList(copy.deepcopy(of_ious) for _ in copies)
        )
        self.bins = bins
        self.embed = None if masks is None else mask_embed(width, masks)
        self.initial_box = box_head(width) if bins else None
        self.qualities = nn.ModuleList(QualityEstimator() for _ in copies) if bins else None
        with torch.no_grad():
            (self.initial_box or self.boxes[0]).get_parameter("layers.2.bias")[2:] += size_bias

    def of(self, segments: Sequence[Segment]) -> Heads | SegmentHeads:
        """The heads of all `segments`, some of which may have their own."""
        each = [segment.heads if isinstance(segment.heads, Heads) else self for segment in segments]
        return (
            self
            if all(heads is self for heads in each)
            else SegmentHeads(each, [s.size for s in segments])
        )

    def logits(self, layer: int, states: Tensor) -> Tensor:
        """Class logits `(B, N, C)` of decoder layer `layer`."""
        out: Tensor = self.classes[min(layer, len(self.classes) - 1)](states)
        return out

    def deltas(self, layer: int, states: Tensor) -> Tensor:
        """Box deltas `(B, N, 4)` of decoder layer `layer`, in logit space;
        with bins `(B, N, 4 (K + 1))`, of the distributions' logits."""
        out: Tensor = self.boxes[min(layer, len(self.boxes) - 1)](states)
        return out

    def initial_deltas(self, states: Tensor) -> Tensor:
        """Deltas `(B, N, 4)` of the boxes before there are distributions, in logit space."""
        assert self.initial_box is not None
        out: Tensor = self.initial_box(states)
        return out

    def quality(self, layer: int, distributions: Tensor) -> Tensor:
        """What the quality of the `distributions (B, N, 4, K + 1)` adds to the class logits,
        `(B, N, 1)`.
        """
        assert self.qualities is not None
        out: Tensor = self.qualities[min(layer, len(self.qualities) - 1)](distributions)
        return out

    def iou_logits(self, layer: int, states: Tensor) -> Tensor | None:
        """Logits `(B, N)` of the IoU of each box with its target, where there is an IoU branch."""
        return (
            None
            if self.ious is None
            else self.ious[min(layer, len(self.ious) - 1)](states).squeeze(-1)
        )

    def mask_embeds(self, states: Tensor) -> Tensor | None:
        """Embeddings `(B, N, Dm)` of the masks, where the detector has any."""
        return None if self.embed is None else self.embed(states)


class SegmentHeads:
    """The heads of segments side by side, `sizes` queries each: every method as in `Heads`."""

    def __init__(self, heads: Sequence[Heads], sizes: Sequence[int]) -> None:
        self.heads, self.sizes = heads, sizes

    def logits(self, layer: int, states: Tensor) -> Tensor:
        """Class logits `(B, N, C)`."""
        return torch.cat([heads.logits(layer, part) for heads, part in self._parts(states)], dim=1)

    def deltas(self, layer: int, states: Tensor) -> Tensor:
        """Box deltas `(B, N, 4)`."""
        return torch.cat([heads.deltas(layer, part) for heads, part in self._parts(states)], dim=1)

    def initial_deltas(self, states: Tensor) -> Tensor:
        """Deltas `(B, N, 4)` of the initial boxes."""
        return torch.cat([heads.initial_deltas(part) for heads, part in self._parts(states)], dim=1)

    def quality(self, layer: int, distributions: Tensor) -> Tensor:
        """What quality adds, `(B, N, 1)`."""
        return torch.cat(
            [heads.quality(layer, part) for heads, part in self._parts(distributions)], dim=1
        )

    def iou_logits(self, layer: int, states: Tensor) -> Tensor | None:
        """Logits `(B, N)` of the IoU, where there is an IoU branch."""
        return joined([heads.iou_logits(layer, part) for heads, part in self._parts(states)])

    def mask_embeds(self, states: Tensor) -> Tensor | None:
        """Embeddings `(B, N, Dm)` of the masks, where the detector has any."""
        return joined([heads.mask_embeds(part) for heads, part in self._parts(states)])

    def _parts(self, states: Tensor) -> Iterator[tuple[Heads, Tensor]]:
        return zip(self.heads, states.split(list(self.sizes), dim=1), strict=True)


def joined(parts: Sequence[Tensor | None], dim: int = 1) -> Tensor | None:
    """What several heads say of queries side by side, along their dimension `dim`;
    None where they say nothing.
    """
    present = [part for part in parts if part is not None]
    return torch.cat(present, dim=dim) if present else None
