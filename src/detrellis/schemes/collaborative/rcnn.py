"""Faster R-CNN (Ren et al., 2015) as an auxiliary head: proposals, and what their features say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.boxes import giou
from detrellis.nn.neck import MapNorm
from detrellis.postprocess import nms, top_pairs
from detrellis.schemes.collaborative.anchors import nine_anchors
from detrellis.schemes.collaborative.assigners import max_iou
from detrellis.schemes.collaborative.coder import Deltas, clip
from detrellis.schemes.collaborative.dense import precise
from detrellis.schemes.collaborative.roi import region_features
from detrellis.schemes.collaborative.rpn import RPN, proposals, rpn_losses, sample
from detrellis.schemes.collaborative.scene import (
    BranchAssignment,
    Draw,
    Predictions,
    Scene,
    on_host,
)

CODER = Deltas(0.1, 0.2)
CELLS = 7  # of a region, along each side
# Pairs of region and class that take part in the final NMS; it rarely needs more to find 100
BEFORE = 5000


class BoxHead(nn.Module):
    """Two layers shared by classes, of which the last is "no object",
    and by a box for each other class.

    `convolutional`: four convolutions and one layer instead, and one box for all classes.
    """

    def __init__(
        self, width: int, classes: int, hidden: int, *, convolutional: bool = False
    ) -> None:
        super().__init__()
        self.classes = classes
        self.tower = _tower(width) if convolutional else nn.Identity()
        self.first = nn.Linear(CELLS * CELLS * width, hidden)
        self.second = nn.Identity() if convolutional else nn.Linear(hidden, hidden)
        boxes = 1 if convolutional else classes
        self.classify, self.regress = nn.Linear(hidden, classes + 1), nn.Linear(hidden, 4 * boxes)
        for layer in (self.first, self.second):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer, std in ((self.classify, 0.01), (self.regress, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features `(R, 7, 7, D)` of regions to what both outputs read, `(R, hidden)`."""
        features = self.tower(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        states: Tensor = self.second(self.first(features.flatten(1)).relu()).relu()
        return states

    def logits(self, states: Tensor) -> Tensor:
        """`(R, C + 1)`, in float32 or better."""
        return precise(self.classify(states))

    def deltas(self, states: Tensor) -> Tensor:
        """`(R, C, 4)`, in float32 or better."""
        deltas: Tensor = precise(self.regress(states)).unflatten(1, (-1, 4))
        return deltas.expand(-1, self.classes, -1)


def _tower(width: int) -> nn.Sequential:
    """Four 3x3 convolutions with GroupNorm."""
    convolutions = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(4)]
    for convolution in convolutions:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(
        *(layer for c in convolutions for layer in (c, MapNorm(32, width), nn.ReLU()))
    )


class RCNN(nn.Module):
    """Losses: the proposals' `rpn_class` and `rpn_box`;
    softmax cross-entropy `class`; `giou` of the decoded boxes.

    `samples` regions of an image learn, up to a quarter of them positive; targets are regions too.
    Regions are read from all levels but the last `appended`. `convolutional`: the head of Co-DETR's
    ViT-L on COCO (`BoxHead`), which moves boxes in half the steps.
    """

    name = "rcnn"
    softmax = True

    def __init__(
        self,
        width: int,
        classes: int,
        strides: Sequence[int],
        *,
        appended: int,
        samples: int,
        hidden: int,
        convolutional: bool = False,
    ) -> None:
        super().__init__()
        self.coder = Deltas(0.05, 0.1) if convolutional else CODER
        self.classes, self.samples = classes, samples
        self.levels = len(strides) - appended
        self.rpn = RPN(width)
        self.head = BoxHead(width, classes, hidden, convolutional=convolutional)

    def forward(self, scene: Scene, draw: Draw) -> tuple[dict[str, Tensor], list[BranchAssignment]]:
        """See `Branch`; regions are sampled positives, then sampled background."""
        # Regions: a sample of the proposals.
        output, anchors = self.rpn(scene.maps), nine_anchors(scene)
        losses = rpn_losses(output, anchors, scene, draw)
        proposed = proposals(
            output, anchors, scene, before=8 * self.samples, limit=2 * self.samples
        )
        regions, owners = sample_regions(proposed, scene.boxes, self.samples, draw)
        features = self.pool(scene, regions, CELLS)
        states = self.head(features)
        logits = scene.counted(self.head.logits(states))
        # Classes of all regions, boxes of the positive ones.
        positive, label, target = positive_regions(scene, owners)
        deltas = self.head.deltas(states[positive])[
            torch.arange(len(positive), device=label.device), label
        ]
        labels = torch.full_like(logits[:, 0], self.classes, dtype=torch.int64).index_copy(
            0, positive, label
        )
        boxes = self.coder.decode(torch.cat(regions)[positive], deltas)
        losses |= region_losses(logits, labels, boxes, target)
        # What was assigned, image by image.
        counts = [len(r) for r in regions]
        parts = zip(
            regions, owners, features.mean((1, 2)).split(counts), logits.split(counts), strict=True
        )
        return losses, [BranchAssignment(*p) for p in parts]

    def pool(self, scene: Scene, regions: Sequence[Tensor], cells: int) -> Tensor:
        """Features `(R, cells, cells, D)` of the images' regions `(n, 4)`."""
        return region_features(
            scene.maps[: self.levels], scene.strides[: self.levels], regions, cells
        )

    @torch.no_grad()
    def predict(self, scene: Scene) -> list[Predictions]:
        """See `Branch`."""
        regions = proposals(
            self.rpn(scene.maps), nine_anchors(scene), scene, before=1000, limit=1000
        )
        states = self.head(self.pool(scene, regions, CELLS))
        counts = [len(r) for r in regions]
        scores = self.head.logits(states).softmax(-1)[:, :-1].split(counts)
        deltas = self.head.deltas(states).split(counts)
        parts = zip(scores, deltas, regions, scene.sizes, strict=True)
        return [select(*of_image, coder=self.coder) for of_image in parts]


def sample_regions(
    proposed: Sequence[Tensor], boxes: Sequence[Tensor], samples: int, draw: Draw
) -> tuple[list[Tensor], list[Tensor]]:
    """What each image learns from: regions `(n, 4)`, at most `samples`, and their owners `(n,)`.

    An image's targets `(T, 4)` come before its proposals `(P, 4)`.
    """
    candidates = [torch.cat(pair) for pair in zip(boxes, proposed, strict=True)]
    owners = [
        max_iou(c, b, positive=0.5, negative=0.5, minimum=0.5, low_quality=False)
        for c, b in zip(candidates, boxes, strict=True)
    ]
    chosen = [
        torch.cat(sample(owner, draw, samples, samples // 4)).to(
            candidates[0].device, non_blocking=True
        )
        for owner in on_host(owners)
    ]
    regions, owned = (
        [values[rows] for values, rows in zip(of_images, chosen, strict=True)]
        for of_images in (candidates, owners)
    )
    return regions, owned


def positive_regions(scene: Scene, owners: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Which of all images' regions are positive, `(P,)`,
    with their targets' labels `(P,)` and boxes `(P, 4)`.
    """
    pairs = zip(owners, scene.offsets, strict=True)
    row = torch.cat([torch.where(owner >= 0, owner + first, owner) for owner, first in pairs])
    positive = (row >= 0).nonzero().squeeze(1)
    return positive, torch.cat(scene.labels)[row[positive]], torch.cat(scene.boxes)[row[positive]]


def region_losses(
    logits: Tensor, labels: Tensor, boxes: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Of all regions' logits `(R, C + 1)` and labels `(R,)`;
    of the positives' boxes and targets, `(P, 4)` each.

    Both are divided by the number of regions, positive or not.
    """
    count = max(len(labels), 1)
    return {
        "class": F.cross_entropy(logits, labels, reduction="sum") / count,
        "giou": 10 * (1 - giou(boxes, targets)).sum() / count,
    }


def select(
    scores: Tensor,
    deltas: Tensor,
    regions: Tensor,
    size: Tensor,
    limit: int = 100,
    *,
    coder: Deltas,
) -> Predictions:
    """An image's detections from scores `(R, C)` and deltas `(R, C, 4)` of regions `(R, 4)`:
    NMS within each class.
    """
    best, region, label = top_pairs(scores, BEFORE)
    boxes = clip(coder.decode(regions[region], deltas[region, label]), size)
    kept = nms(boxes, best, label, 0.5, limit, first=3 * limit)
    return Predictions(best[kept], label[kept], boxes[kept])
