"""What all dense heads share:
towers over the levels, anchors, and sums of losses over what each anchor learns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from detrellis.distributed import reduce_mean
from detrellis.losses import focal_negative, focal_positive
from detrellis.nn.neck import MapNorm
from detrellis.postprocess import top_pairs
from detrellis.schemes.collaborative.anchors import usable_cells
from detrellis.schemes.collaborative.assigners import IGNORED
from detrellis.schemes.collaborative.coder import clip
from detrellis.schemes.collaborative.scene import (
    BranchAssignment,
    Draw,
    Ints,
    Predictions,
    Scene,
)
from detrellis.set_loss import absent
from detrellis.types import on_device

# Of anchors and targets that an assignment looks at together: 64 MB of float32 for each number that
# a pair has
PAIRS = 2**24


class DenseOutput(NamedTuple):
    """What a dense head predicts for every anchor, in float32 or better."""

    logits: Tensor  # (B, A, C)
    regression: Tensor  # (B, A, 4), or more numbers for a box
    quality: Tensor | None  # (B, A) logits of the third output, where there is one


class Positives(NamedTuple):
    """The positive anchors of a batch; `P` of them."""

    image: Tensor  # (P,)
    anchor: Tensor  # (P,)
    target: Tensor  # (P,) row of the batch's targets
    label: Tensor  # (P,)
    box: Tensor  # (P, 4) the targets' boxes, xyxy
    images: int

    def per_image(self) -> Tensor:
        """How many each image has, `(B,)` floats."""
        return torch.bincount(self.image, minlength=self.images).to(self.box)


def conv(inputs: int, outputs: int, *, bias: float = 0.0) -> nn.Conv2d:
    """A 3x3 convolution, initialised as dense heads are."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
    return layer


def tower(width: int, convolutions: int) -> nn.Sequential:
    """Stacked 3x3 convolutions with GroupNorm."""
    parts = [(conv(width, width), MapNorm(32, width), nn.ReLU()) for _ in range(convolutions)]
    return nn.Sequential(*(layer for part in parts for layer in part))


class DenseHead(nn.Module):
    """A tower for classes and one for boxes, shared by all levels;
    boxes times a learned number for each level.

    `anchors` of each cell, each with `box_outputs` numbers for its box; `quality`: one logit more
    for each (centerness, or IoU).
    """

    def __init__(
        self,
        width: int,
        classes: int,
        levels: int,
        *,
        anchors: int = 1,
        box_outputs: int = 4,
        quality: bool = False,
        convolutions: int = 1,
    ) -> None:
        super().__init__()
        self.anchors = anchors
        self.class_tower, self.box_tower = tower(width, convolutions), tower(width, convolutions)
        self.classify = conv(width, anchors * classes, bias=-math.log(99))
        self.regress = conv(width, anchors * box_outputs)
        self.quality = conv(width, anchors) if quality else None
        self.scale = nn.Parameter(torch.ones(levels))

    def forward(self, maps: Sequence[Tensor]) -> DenseOutput:
        """Maps `(B, D, H, W)` of the levels to numbers for all anchors."""
        logits, boxes, quality = [], [], []
        for x, scale in zip(maps, self.scale.unbind(), strict=True):
            box_features = self.box_tower(x)
            logits.append(self.classify(self.class_tower(x)))
            boxes.append(self.regress(box_features) * scale)
            if self.quality is not None:
                quality.append(self.quality(box_features))
        return DenseOutput(
            by_anchor(logits, self.anchors),
            by_anchor(boxes, self.anchors),
            by_anchor(quality, self.anchors).squeeze(-1) if quality else None,
        )


class DenseBranch(nn.Module, ABC):
    """A dense head as a branch (see `Branch`).
    Subclasses say what it assigns, how it learns, and what it detects.
    """

    name: ClassVar[str]
    softmax: ClassVar[bool] = False
    each: ClassVar[int] = 1  # anchors of a cell
    box_outputs: ClassVar[int] = 4  # numbers for the box of an anchor
    quality: ClassVar[bool] = False  # whether there is a third output, the quality of the box
    nms: ClassVar[float] = 0.6  # IoU, of its own detections

    def __init__(self, width: int, classes: int, levels: int, *, convolutions: int = 1) -> None:
        super().__init__()
        self.head = DenseHead(
            width,
            classes,
            levels,
            anchors=self.each,
            box_outputs=self.box_outputs,
            quality=self.quality,
            convolutions=convolutions,
        )

    @abstractmethod
    def supervise(
        self, output: DenseOutput, scene: Scene
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses by name, boxes that queries come from `(A, 4)` xyxy, and owners `(B, A)`."""

    @abstractmethod
    def boxes(self, output: DenseOutput, scene: Scene) -> Tensor:
        """The predicted boxes `(B, A, 4)` xyxy."""

    def scores(self, output: DenseOutput) -> Tensor:
        """What detections are ranked by, `(B, A, C)`:
        the classes' scores, times the quality where there is one.
        """
        scores = output.logits.sigmoid()
        return scores if output.quality is None else scores * output.quality.sigmoid().unsqueeze(-1)

    def output(self, scene: Scene) -> DenseOutput:
        """The head's output on the scene's maps."""
        output: DenseOutput = self.head(scene.maps)
        return output

    def forward(self, scene: Scene, draw: Draw) -> tuple[dict[str, Tensor], BranchAssignment]:
        """See `Branch`, with the memory's features at the anchors' cells."""
        output = self.output(scene)
        output = output._replace(logits=scene.counted(output.logits))
        losses, boxes, owners = self.supervise(output, scene)
        boxes = boxes.expand(len(owners), -1, -1)
        return losses, BranchAssignment(boxes, owners, by_cell(scene.maps), output.logits)

    @torch.no_grad()
    def predict(self, scene: Scene) -> list[Predictions]:
        """See `Branch`."""
        output = self.output(scene)
        return select_dense(scene, self.scores(output), self.boxes(output, scene), nms=self.nms)


def by_anchor(maps: Sequence[Tensor], anchors: int) -> Tensor:
    """Outputs `(B, anchors * n, H, W)` of the levels as `(B, A, n)`, in the anchors' order."""
    return precise(by_cell(maps).unflatten(2, (anchors, -1)).flatten(1, 2))


def by_cell(maps: Sequence[Tensor]) -> Tensor:
    """Maps `(B, D, H, W)` of the levels as `(B, S, D)`, in the cells' order."""
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)


def precise(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def assign_usable(
    scene: Scene, anchors: Tensor, assign: Callable[[Tensor, Sequence[int], Tensor, Tensor], Tensor]
) -> Tensor:
    """Owners `(B, A)` by `assign(anchors, anchors of each level, targets' boxes, possible)`,
    a rule of `assigners`.

    An anchor whose cell lies on padding takes no part and is ignored. `anchors (A, 4)`, or points
    `(A, 2)`.
    """
    # Which anchors take part, and how many there are on each level.
    cells = [h * w for h, w in scene.shapes]
    each = len(anchors) // sum(cells)
    usable = usable_cells(scene.shapes, scene.strides, scene.sizes).repeat_interleave(each, dim=1)
    per_level = [each * n for n in cells]
    # All images together where pairs are few, each operation of which costs a launch; one after
    # the other where their memory does.
    boxes, present = scene.padded()
    together = max(1, PAIRS // (len(anchors) * boxes.shape[1]))
    parts = zip(*(t.split(together) for t in (usable, boxes, present)), strict=True)
    owners = [
        assign(anchors, per_level, targets, cells_used.unsqueeze(-1) & there.unsqueeze(-2))
        for cells_used, targets, there in parts
    ]
    return torch.cat(owners).masked_fill(~usable, IGNORED)


def gather_positives(scene: Scene, owners: Tensor) -> Positives:
    """The anchors to which a target is assigned, with what they should learn; `owners (B, A)`."""
    image, anchor = (owners >= 0).nonzero(as_tuple=True)
    row = on_device(scene.offsets, owners.device)[image] + owners[image, anchor]
    return Positives(
        image, anchor, row, torch.cat(scene.labels)[row], torch.cat(scene.boxes)[row], len(owners)
    )


def positives_of(scene: Scene, owners: Ints) -> Positives:
    """As `gather_positives`, of `owners (B, A)` that the host knows: it has nothing to wait for."""
    image, anchor = (owners >= 0).nonzero()
    row = np.array(scene.offsets)[image] + owners[image, anchor]
    rows = on_device(np.stack([image, anchor, row]), scene.sizes.device)
    in_image, at, target = rows.unbind()
    labels, boxes = torch.cat(scene.labels)[target], torch.cat(scene.boxes)[target]
    return Positives(in_image, at, target, labels, boxes, len(owners))


def focal_sum(logits: Tensor, owners: Tensor, positives: Positives) -> Tensor:
    """Focal loss (RetinaNet: 0.25, 2) of all classes,
    summed over the anchors that are not ignored.
    """
    present = focal_positive(logits[positives.image, positives.anchor, positives.label]).sum()
    return 0.25 * present + 0.75 * absence_sum(logits, owners, positives)


def absence_sum(logits: Tensor, owners: Tensor, positives: Positives) -> Tensor:
    """Focal loss without its 0.75 of the classes that are not there,
    over the anchors that are not ignored.
    """
    others = logits.index_put(
        (positives.image, positives.anchor, positives.label), absent(logits.dtype, logits.device)
    )
    return (focal_negative(others).sum(-1) * (owners != IGNORED)).sum()


def mean_positives(positives: Positives) -> Tensor:
    """What sums over anchors are divided by:
    positives, at least one an image, as a mean over processes.
    """
    return reduce_mean(positives.per_image().clamp(min=1).sum()).clamp(min=1)


def select_dense(
    scene: Scene, scores: Tensor, boxes: Tensor, *, nms: float, before: int = 1000, limit: int = 100
) -> list[Predictions]:
    """A dense head's detections, NMS within each class, cut to the image; padding has none.

    Scores `(B, A, C)`, boxes `(B, A, 4)` xyxy.
    """
    usable = usable_cells(scene.shapes, scene.strides, scene.sizes)
    usable = usable.repeat_interleave(scores.shape[1] // usable.shape[1], dim=1)
    scores = scores * usable.unsqueeze(-1)
    predictions = []
    for image_scores, image_boxes, size in zip(scores, boxes, scene.sizes, strict=True):
        best, anchor, label = top_pairs(image_scores, before)
        clipped = clip(image_boxes[anchor], size)
        kept = batched_nms(clipped, best, label, nms)[:limit]
        kept = kept[best[kept] > 0]
        predictions.append(Predictions(best[kept], label[kept], clipped[kept]))
    return predictions
