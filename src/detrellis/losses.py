"""Losses as pure functions. None averages over queries: the set losses divide by the number of boxes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, giou


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Elementwise focal loss `alpha_t (1 - p_t)^gamma BCE` (RetinaNet, Eq. 5), finite at any logit.

    `targets` in {0, 1}, of the logits' shape.
    """
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    miss = p + targets - 2 * p * targets  # 1 - p_t
    return (alpha * targets + (1 - alpha) * (1 - targets)) * miss**gamma * bce


def l1_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Sum over the four coordinates of `|b - g|`: `(M, 4)` each to `(M,)`."""
    return (boxes - targets).abs().sum(-1)


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """`1 - GIoU` of aligned `(cx, cy, w, h)` boxes: `(M, 4)` each to `(M,)`."""
    return 1 - giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
