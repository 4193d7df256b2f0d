"""Losses as pure functions of each element.
None averages over queries: the set losses divide by the number of boxes.

Classification works on logits `x` with `p = sigmoid(x)`, in log-sigmoids: finite at any logit,
gradients too. A `ClassLoss` takes logits and targets in [0, 1] of positives, `(M,)` each, and
returns `(M,)`; what all other entries learn is `focal_negative`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ClassLoss = Callable[[Tensor, Tensor], Tensor]


def focal_negative(logits: Tensor, gamma: float = 2.0, *, detached: bool = False) -> Tensor:
    """Focal loss of a class that is not there: `-p^gamma log(1 - p)`; `gamma` is 0, or 1 and more.

    `detached`: no gradient flows through the factor `p^gamma`, which then only weighs the entries
    (RT-DETR, DEIM).
    """
    factor = logits.detach() if detached else logits
    return factor.sigmoid() ** gamma * F.softplus(logits)


def focal_positive(logits: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss of a class that is there: `-(1 - p)^gamma log p`; `gamma` as `focal_negative`."""
    return focal_negative(-logits, gamma)


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss (RetinaNet, Eq. 5) of positives: `-0.25 (1 - p)^2 log p`, whatever the target."""
    return 0.25 * focal_positive(logits)


def quality_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """QFL (Generalized Focal Loss, Eq. 2): `|t - p|^2 BCE(p, t)`."""
    return (targets - logits.sigmoid()) ** 2 * bce_loss(logits, targets)


def varifocal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """VFL (VarifocalNet, Eq. 2): `t BCE(p, t)`."""
    return targets * bce_loss(logits, targets)


def bce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy `BCE(p, t)` with a soft target."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def distribution_focal_loss(logits: Tensor, distance: Tensor) -> Tensor:
    """DFL (Generalized Focal Loss, Eq. 6):
    cross-entropy with the two bins beside a distance, each as near as it is.

    `logits (M, bins)` of the distances 0, 1, ...; `distance (M,)` in [0, bins - 1); to `(M,)`.
    """
    low = distance.long()
    return _both_beside(logits, low, distance - low)


def bins_beside(values: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """For `values (...)` between two of the ascending `bins (K + 1,)`: the left one `(...)`, and
    how near the right one is, in [0, 1]; values beyond the ends count as the ends."""
    left = (torch.searchsorted(bins, values.contiguous(), right=True) - 1).clamp(0, len(bins) - 2)
    low, high = bins[left], bins[left + 1]
    return left, ((values - low) / (high - low)).clamp(0, 1)


def fine_grained_localization_loss(logits: Tensor, distance: Tensor, bins: Tensor) -> Tensor:
    """FGL (D-FINE, Eq. 6) without its weight:
    as `distribution_focal_loss`, for bins that are not equally far apart.

    `logits (M, K + 1)` of distributions over the ascending `bins (K + 1,)`; `distance (M,)`; to
    `(M,)`.
    """
    return _both_beside(logits, *bins_beside(distance, bins))


def _both_beside(logits: Tensor, left: Tensor, nearness: Tensor) -> Tensor:
    """Cross-entropy `(M,)` with the `left (M,)` bin and the next one,
    weighted by their `nearness` to it.
    """
    below, above = (F.cross_entropy(logits, bin, reduction="none") for bin in (left, left + 1))
    return (1 - nearness) * below + nearness * above


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float = 5.0) -> Tensor:
    """What DDF (D-FINE, Eq. 7) weighs: `T^2 KL(softmax(teacher / T) || softmax(logits / T))`,
    `(..., K + 1)` each to `(...)`. The teacher gets no gradient."""
    student, goal = ((x / temperature).log_softmax(-1) for x in (logits, teacher.detach()))
    return temperature**2 * F.kl_div(student, goal, reduction="none", log_target=True).sum(-1)


def l1_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Sum over the four coordinates of `|b - g|`: `(M, 4)` each to `(M,)`."""
    return (boxes - targets).abs().sum(-1)
