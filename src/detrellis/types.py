"""The typed records that flow through a detector.

Sizes: `B` images, `N` queries, `L` decoder layers, `C` classes, `D` width, `S` memory tokens, `V`
feature levels, `T` targets in the batch. Boxes inside the network are always normalised
`(cx, cy, w, h)`, relative to the image without its padding; pixel `xyxy` exists only where data
enters and detections leave. Padding masks are True on padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Channels = tuple[float, float, float]  # red, green, blue
# What backbones trained on ImageNet are usually given: `(x - mean) / std` of pixels from 0 to 1.
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor on the `device`; unlike with `torch.tensor(..., device=...)`,
    the host does not wait until they are there.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


class ImageBatch(NamedTuple):
    """Images, padded at the bottom and on the right to one size."""

    pixels: Tensor  # (B, 3, H, W) normalised by mean and std; zero on padding
    padding: Tensor | None = None  # (B, H, W) bool, True on padding; None when no image is padded

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """This batch on `device`."""
        padding = (
            None if self.padding is None else self.padding.to(device, non_blocking=non_blocking)
        )
        return ImageBatch(self.pixels.to(device, non_blocking=non_blocking), padding)

    def padded(self, below: int, right: int) -> ImageBatch:
        """This batch with so many rows of padding more below, and columns on the right."""
        (count, _, height, width), frame = self.pixels.shape, (0, right, 0, below)
        if self.padding is None:
            y = torch.arange(height + below, device=self.pixels.device)
            x = torch.arange(width + right, device=self.pixels.device)
            padding = ((y[:, None] >= height) | (x >= width)).expand(count, -1, -1)
        else:
            padding = F.pad(self.padding, frame, value=True)
        return ImageBatch(F.pad(self.pixels, frame), padding)


class Targets(NamedTuple):
    """Ground truth packed over the batch: image `b` owns the next `sizes[b]` rows."""

    labels: Tensor  # (T,) int64
    boxes: Tensor  # (T, 4)
    sizes: tuple[int, ...]  # targets per image, on the host; sums to T
    # (T, M, M) bool, each seen within its box; M = 112. None unless a scheme needs them
    masks: Tensor | None = None
    # (T, H, W) bool, False on padding, H and W the batch's. None unless asked for
    bitmaps: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """These targets on `device`."""
        return self.map(partial(Tensor.to, device=device, non_blocking=non_blocking))

    def map(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """Every tensor after `change`."""
        masks, bitmaps = (None if t is None else change(t) for t in (self.masks, self.bitmaps))
        return Targets(change(self.labels), change(self.boxes), self.sizes, masks, bitmaps)

    @property
    def image(self) -> Tensor:
        """(T,) index of the image that owns each target."""
        sizes = on_device(self.sizes, self.labels.device)
        return torch.repeat_interleave(sizes, output_size=len(self.labels))

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each image."""
        starts, total = [], 0
        for size in self.sizes:
            starts.append(total)
            total += size
        return tuple(starts)


class MaskFeatures(NamedTuple):
    """What the masks of a batch are read from:
    the logits of an embedding `e (Dm,)` are `e . map`, above 0 inside.
    """

    map: Tensor  # (B, Dm, h, w), over the whole of the padded images
    size: tuple[int, int]  # height, width of the padded images in pixels
    # (B, height, width) bool, True on padding; None when no image is padded
    padding: Tensor | None = None


class Memory(NamedTuple):
    """Encoded image features, all levels flattened row by row, finest level first."""

    tokens: Tensor  # (B, S, D)
    position: Tensor  # (B or 1, S, D)
    shapes: tuple[tuple[int, int], ...]  # (height, width) of each level
    padding: Tensor | None = None  # (B, S) bool; None: no padding, no mask work
    # (B, V, 2) valid fraction of (width, height); None where padding is None
    valid_ratios: Tensor | None = None
    masks: MaskFeatures | None = None  # of detectors that give masks
    # (B, S) logits that the encoder chose tokens by; None: it refines all
    salience: Tensor | None = None


class Queries(NamedTuple):
    """Decoder queries of one block."""

    content: Tensor  # (B, N, D)
    position: Tensor | None = None  # (B, N, D); None where the decoder derives it from the boxes
    # (B, N, 4) boxes or (B, N, 2) points in [0, 1]; None: DETR's queries have no place
    boxes: Tensor | None = None


class Prior(NamedTuple):
    """Where each head of each query looks (SMCA):
    `-[(s_x (x - c_x))^2 + (s_y (y - c_y))^2] / 8` is added to logits.

    In cells of the map. A larger scale looks at less; 0 looks everywhere.
    """

    centre: Tensor  # (B, N, M, 2) x, y
    scale: Tensor  # (B, N, M, 2)
    # Coordinate of the first cell: 0, or 0.5 where cells are counted at their centres
    first: float = 0.0


class Spatial(NamedTuple):
    """Where the queries of one attention layer are, beside what they contain."""

    # (B or 1, N, D) embedding that is added to the content, or projected beside it
    position: Tensor
    # (B or 1, N, 2 or 4) points or boxes in [0, 1]; None where nothing reads them
    references: Tensor | None = None
    # (B, N, D) the conditional spatial query of cross-attention (Conditional DETR)
    sine: Tensor | None = None
    priors: tuple[Prior, ...] | None = None  # of each level (SMCA)
    # (B, N, V) of what a query reads from each level (SMCA); None: there is one
    level_weights: Tensor | None = None
    # (B, N, S) bool: the tokens that each query may read (Mask2Former); None: all
    readable: Tensor | None = None


class Segment(NamedTuple):
    """One block of a concatenated query sequence, as self-attention sees it."""

    name: str
    size: int  # queries in all copies together
    copies: int = 1  # equal parts that do not see each other
    sees: tuple[str, ...] = ()  # other segments whose queries it may also read
    # (B, size) bool: queries that nobody but themselves reads; None: all are read
    unused: Tensor | None = None
    # Several queries of a copy may learn one target: they are not held to be distinct
    repeats: bool = False
    # Class and box heads of its own (`nn/heads.py`); None: the decoder's
    heads: nn.Module | None = None
    # Its queries read each other; else they pass self-attention by, norm and all
    attends: bool = True
    # (B, M, size, size + those seen), or without any (B * copies, M, n, n), is added to logits;
    # None: nothing is
    bias: Tensor | None = None


class SideDistributions(NamedTuple):
    """Boxes as distributions over how far each side lies from that of a fixed box (D-FINE)."""

    logits: Tensor  # (L, B, N, 4, K + 1) of left, top, right, bottom
    base: Tensor  # (L, B, N, 4) the fixed box, the same in all layers, without gradient
    # (K + 1,) the distance that each entry stands for, ascending, as `boxes.side_distances` counts
    # it
    bins: Tensor
    scale: float  # of those distances: they count in `1 / scale` of the fixed box's sides

    def map(self, change: Callable[[Tensor], Tensor]) -> SideDistributions:
        """Every tensor of the queries after `change`."""
        return self._replace(logits=change(self.logits), base=change(self.base))


class Between(NamedTuple):
    """The queries of decoder layers between their cross-attention and self-attention,
    where it comes second.
    """

    states: Tensor  # (L, B, N, D)
    # (L, B, N, 2 or 4) that each layer read, without gradient from its second on
    references: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Between:
        """Every tensor after `change`."""
        return Between(
            change(self.states), None if self.references is None else change(self.references)
        )


class Passed(NamedTuple):
    """One set of queries as a decoder layer hands it on."""

    states: Tensor  # (B, N, D)
    # (B, N, 2 or 4) that the next layer reads; None where queries have no place
    references: Tensor | None
    boxes: Tensor | None  # the same, as the next layer moves them: losses may reach through them

    def map(self, change: Callable[[Tensor], Tensor]) -> Passed:
        """Every tensor after `change`."""
        references, boxes = (
            None if t is None else change(t) for t in (self.references, self.boxes)
        )
        return Passed(change(self.states), references, boxes)


class DecoderOutput(NamedTuple):
    """The heads' outputs after every decoder layer (training) or after the last one only
    (inference: L = 1).
    """

    logits: Tensor  # (L, B, N, C)
    boxes: Tensor  # (L, B, N, 4); (L, B, N, 0) of a detector that predicts masks and no boxes
    states: Tensor  # (L, B, N, D) the heads' input
    # (L, B, N) of the IoU that the IoU branch predicts; None: there is no such head
    iou_logits: Tensor | None = None
    # (L, B, N, Dm) what `masks.map` is multiplied with; None: there are no masks
    mask_embeds: Tensor | None = None
    masks: MaskFeatures | None = None  # of the images, the same for all layers and queries
    # That the boxes are the means of (D-FINE); None: boxes are predicted
    sides: SideDistributions | None = None
    # Of one layer, the first: logits and boxes before there are distributions
    initial: DecoderOutput | None = None
    # Of all layers, in training, where cross-attention comes first (MS-DETR)
    between: Between | None = None
    # By each layer, in training; none where boxes are distributions
    passed: tuple[Passed, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> DecoderOutput:
        """Every tensor of the queries after `change`, which gets `L` first;
        without what layers passed on.
        """
        iou_logits, embeds = (
            None if t is None else change(t) for t in (self.iou_logits, self.mask_embeds)
        )
        logits, boxes, states = (change(t) for t in (self.logits, self.boxes, self.states))
        sides = None if self.sides is None else self.sides.map(change)
        initial = None if self.initial is None else self.initial.map(change)
        between = None if self.between is None else self.between.map(change)
        return self._replace(
            logits=logits,
            boxes=boxes,
            states=states,
            iou_logits=iou_logits,
            mask_embeds=embeds,
            sides=sides,
            initial=initial,
            between=between,
            passed=(),
        )

    def rows(self, first: int, count: int) -> DecoderOutput:
        """The output of `count` queries from the `first` on."""
        passed = tuple(p.map(lambda t: t.narrow(1, first, count)) for p in self.passed)
        return self.map(lambda t: t.narrow(2, first, count))._replace(passed=passed)


class Proposals(NamedTuple):
    """What a two-stage detector's encoder proposes:
    of all `S` tokens, and of the `N` selected, best first.
    """

    states: Tensor  # (B, S, D) the heads' input
    # (B, S, 4) logits of the box that each token moves; +inf where it can propose none
    anchors: Tensor
    logits: Tensor  # (B, S, C)
    scores: Tensor  # (B, S) what tokens are ranked by; -inf: last
    best: Tensor  # (B, N) token index of the selected
    selected: Tensor  # (B, N, D) their states
    # (B, N, 4) their boxes in [0, 1]; a token that can propose none gives 1 (relative boxes: 0)
    boxes: Tensor
    # (B, N, Dm) of their masks, where queries begin with the boxes around them
    mask_embeds: Tensor | None = None
    # (B, S, 4) boxes around the tokens' cells, by which they are distinct; None: by boxes
    cells: Tensor | None = None

    def ranked(self, count: int) -> Tensor:
        """The `count` tokens `(B, count)` of the highest scores;
        fewer where there are not so many.
        """
        return self.scores.topk(min(count, self.scores.shape[1]), dim=1).indices

    def rest(self, count: int) -> Tensor:
        """As `ranked`, of the tokens that are not selected."""
        left = self.scores.scatter(1, self.best, -math.inf)
        return left.topk(min(count, left.shape[1] - self.best.shape[1]), dim=1).indices


class Assignment(NamedTuple):
    """Which query learns which target: one row per positive, any number per target and per layer.

    Rows of one candidate set are candidates for one target, to be ranked among each other, in the
    order of their queries.
    """

    layer: Tensor  # (M,) int64 decoder layer
    image: Tensor  # (M,) int64
    query: Tensor  # (M,) int64
    target: Tensor  # (M,) int64 row of the packed `Targets`
    candidate_set: Tensor  # (M,) int64; one number for each target, layer and copy of a block


class Detections(NamedTuple):
    """Final detections of one image, highest score first."""

    scores: Tensor  # (K,)
    labels: Tensor  # (K,) int64 class index, 0..C-1
    boxes: Tensor  # (K, 4) pixel xyxy in the original image
    # Of each, COCO's compressed run lengths of the original image
    masks: tuple[bytes, ...] | None = None
    queries: Tensor | None = None  # (K,) int64 which query gave it; None: not of queries

    def take(self, rows: Tensor) -> Detections:
        """Those of these rows `(n,)`, in their order."""
        masks = None if self.masks is None else tuple(self.masks[row] for row in rows.tolist())
        queries = None if self.queries is None else self.queries[rows]
        return Detections(self.scores[rows], self.labels[rows], self.boxes[rows], masks, queries)
