"""Faster R-CNN (Ren et al., 2015) as an auxiliary head: proposals, and what their features say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.boxes import giou
from detrellis.nn.neck import MapNorm
from detrellis.postprocess import nms, top_pairs
from detrellis.schemes.collaborative.anchors import nine_anchors
from detrellis.schemes.collaborative.assigners import BACKGROUND, IGNORED, max_iou
from detrellis.schemes.collaborative.coder import Deltas, clip
from detrellis.schemes.collaborative.dense import Positives, positives_of, precise
from detrellis.schemes.collaborative.roi import region_features
from detrellis.schemes.collaborative.rpn import RPN, Proposals, proposals, rpn_losses, sample
from detrellis.schemes.collaborative.scene import (
    BranchAssignment,
    Draw,
    Predictions,
    Scene,
    below_each_other,
)
from detrellis.types import on_device

CODER = Deltas(0.1, 0.2)
CELLS = 7  # of a region, along each side
NO_REGION = -100  # a label that learns nothing
# Pairs of region and class that take part in the final NMS; it rarely needs more to find 100
BEFORE = 5000


class Regions(NamedTuple):
    """What each image learns from."""

    boxes: Tensor  # (B, R, 4) xyxy
    owner: Tensor  # (B, R) row of the image's targets, BACKGROUND, or IGNORED: none is there
    positives: Positives
    there: int  # how many there are, in all images


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

    def forward(self, scene: Scene, draw: Draw) -> tuple[dict[str, Tensor], BranchAssignment]:
        """See `Branch`; regions are sampled positives, then sampled background."""
        # Regions: a sample of the proposals.
        output, anchors = self.rpn(scene.maps), nine_anchors(scene)
        losses = rpn_losses(output, anchors, scene, draw)
        proposed = proposals(
            output, anchors, scene, before=8 * self.samples, limit=2 * self.samples
        )
        regions = sample_regions(proposed, scene, self.samples, draw)
        features = self.pool_all(scene, regions.boxes)
        states = self.head(features)
        logits = scene.counted(self.head.logits(states))
        # Classes of all regions, boxes of the positive ones.
        positives = regions.positives
        where = (positives.image, positives.anchor)
        states = states.unflatten(0, regions.owner.shape)[where]
        deltas = self.head.deltas(states).gather(
            1, positives.label[:, None, None].expand(-1, -1, 4)
        )
        labels = torch.where(regions.owner == BACKGROUND, self.classes, NO_REGION)
        labels = labels.index_put(where, positives.label).flatten()
        boxes = self.coder.decode(regions.boxes[where], deltas.squeeze(1))
        losses |= region_losses(logits, labels, boxes, positives.box, regions.there)
        # What was assigned.
        features, logits = (
            t.unflatten(0, regions.owner.shape) for t in (features.mean((1, 2)), logits)
        )
        return losses, BranchAssignment(regions.boxes, regions.owner, features, logits)

    def pool_all(self, scene: Scene, regions: Tensor) -> Tensor:
        """Features `(B R, 7, 7, D)` of the regions `(B, R, 4)`."""
        image = torch.arange(len(regions), device=regions.device)
        image = image.unsqueeze(1).expand(regions.shape[:2])
        return self.pool(scene, regions.flatten(0, 1), image.flatten(), CELLS)

    def pool(self, scene: Scene, regions: Tensor, image: Tensor, cells: int) -> Tensor:
        """Features `(R, cells, cells, D)` of the regions `(R, 4)`, each of the `image (R,)`."""
        return region_features(
            scene.maps[: self.levels], scene.strides[: self.levels], regions, image, cells
        )

    @torch.no_grad()
    def predict(self, scene: Scene) -> list[Predictions]:
        """See `Branch`."""
        boxes, valid = proposals(
            self.rpn(scene.maps), nine_anchors(scene), scene, before=1000, limit=1000
        )
        states = self.head(self.pool_all(scene, boxes))
        scores = self.head.logits(states).softmax(-1)[:, :-1].unflatten(0, valid.shape)
        deltas = self.head.deltas(states).unflatten(0, valid.shape)
        parts = zip(scores, deltas, boxes, valid, scene.sizes, strict=True)
        return [
            select(s[there], d[there], b[there], size, coder=self.coder)
            for s, d, b, there, size in parts
        ]


def sample_regions(proposed: Proposals, scene: Scene, samples: int, draw: Draw) -> Regions:
    """At most `samples` regions of each image. Its targets come before its proposals."""
    # Which target each candidate would learn.
    boxes, present = scene.padded()
    candidates = torch.cat([boxes, proposed.boxes], dim=1)
    valid = torch.cat([present, proposed.valid], dim=1)
    possible = valid.unsqueeze(-1) & present.unsqueeze(-2)
    owners = max_iou(
        candidates, boxes, possible, positive=0.5, negative=0.5, minimum=0.5, low_quality=False
    ).masked_fill(~valid, IGNORED)
    # Those drawn; an image with fewer than others gets its first candidate again, ignored.
    known = owners.cpu().numpy()
    drawn = [sample(owner, draw, samples, samples // 4) for owner in known]
    table, there = below_each_other(drawn, max(1, *map(len, drawn)))
    known = np.where(there, np.take_along_axis(known, table, 1), IGNORED)
    rows, owner = on_device(np.stack([table, known]), candidates.device).unbind()
    return Regions(
        candidates.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4)),
        owner,
        positives_of(scene, known),
        sum(map(len, drawn)),
    )


def region_losses(
    logits: Tensor, labels: Tensor, boxes: Tensor, targets: Tensor, count: int
) -> dict[str, Tensor]:
    """Of all regions' logits `(R, C + 1)` and labels `(R,)`, which may be `NO_REGION`;
    of the positives' boxes and targets, `(P, 4)` each.

    Both are divided by the `count` of regions, positive or not.
    """
    count = max(count, 1)
    return {
        "class": F.cross_entropy(logits, labels, reduction="sum", ignore_index=NO_REGION) / count,
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
