"""Mask R-CNN (He et al., 2017) as an auxiliary head:
Faster R-CNN's, whose positive regions also learn a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.losses import bce_loss
from detrellis.schemes.collaborative.dense import gather_positives
from detrellis.schemes.collaborative.rcnn import RCNN
from detrellis.schemes.collaborative.scene import BranchAssignment, Draw, Predictions, Scene

CELLS = 14  # of a region's features, along each side; its mask has twice as many


class MaskHead(nn.Module):
    """Four convolutions, one that doubles the resolution, and a mask for each class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(4)]
        self.tower = nn.Sequential(*(layer for c in convolutions for layer in (c, nn.ReLU())))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.classify = nn.Conv2d(width, classes, 1)
        for layer in (*convolutions, self.upsample):
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        assert self.classify.bias is not None
        nn.init.normal_(self.classify.weight, std=0.001)
        nn.init.zeros_(self.classify.bias)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features `(P, 14, 14, D)` to logits `(P, 28, 28)` of the mask of each region's label
        `(P,)`.
        """
        x = self.upsample(self.tower(features.permute(0, 3, 1, 2))).relu()
        # Only the label's mask learns: no other class is computed.
        assert self.classify.bias is not None
        weight, bias = self.classify.weight[labels], self.classify.bias[labels]
        masks: Tensor = weight.flatten(1).unsqueeze(1) @ x.flatten(2) + bias[:, None, None]
        return masks.view(len(x), *x.shape[2:])


class MaskRCNN(nn.Module):
    """Losses: those of `RCNN`, and the cross-entropy `mask`. The arguments are those of `RCNN`."""

    name = "mask"
    softmax = True

    def __init__(self, width: int, classes: int, strides: Sequence[int], **options: Any) -> None:
        super().__init__()
        self.boxes = RCNN(width, classes, strides, **options)
        self.masks = MaskHead(width, classes)

    def forward(self, scene: Scene, draw: Draw) -> tuple[dict[str, Tensor], BranchAssignment]:
        """See `Branch`. The scene must have masks."""
        assert scene.masks is not None, "branch 'mask' needs targets with masks"
        losses, assigned = self.boxes(scene, draw)
        positives = gather_positives(scene, assigned.owner)
        regions = assigned.boxes[positives.image, positives.anchor]
        features = self.boxes.pool(scene, regions, positives.image, CELLS)
        logits = self.masks(features, positives.label)
        masks = torch.cat(scene.masks)[positives.target]
        target = crop_masks(masks, positives.box, regions, cells=2 * CELLS)
        losses["mask"] = bce_loss(logits, target.to(logits)).sum() / max(target.numel(), 1)
        return losses, assigned

    def predict(self, scene: Scene) -> list[Predictions]:
        """See `Branch`."""
        return self.boxes.predict(scene)


def crop_masks(masks: Tensor, boxes: Tensor, regions: Tensor, *, cells: int) -> Tensor:
    """Each mask within its region of `(P, 4)`:
    `(P, cells, cells)` bool, read at the cells' centres.

    `masks (P, M, M)` lie within `boxes (P, 4)`; there is nothing outside.
    """
    # The cells' centres along x and along y, (P, cells, 2), from -1 to 1 across the mask's box.
    low, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    steps = ((torch.arange(cells, device=boxes.device) + 0.5) / cells).to(boxes)
    corner, extent = regions[:, :2] - low, regions[:, 2:] - regions[:, :2]
    centres = (
        2 * (corner.unsqueeze(1) + steps[:, None] * extent.unsqueeze(1)) / size.unsqueeze(1) - 1
    )
    x, y = centres[..., 0], centres[..., 1]
    grid = torch.stack(
        [x.unsqueeze(1).expand(-1, cells, -1), y.unsqueeze(2).expand(-1, -1, cells)], dim=-1
    )
    return F.grid_sample(masks.unsqueeze(1).to(grid), grid, align_corners=False).squeeze(1) >= 0.5
