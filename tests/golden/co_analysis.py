"""Checks of Co-DETR's measurements, whose arrays are computed from the definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from detrellis.analysis.conflicts import conflict_matrix, head_conflict
from detrellis.analysis.discriminability import feature_score, foreground, fractions_above
from detrellis.analysis.instability import instability

from .arrays import Arrays


def check_derived(a: Arrays) -> None:
    """Eq. 7 and 8, the instability between epochs, and Eq. 10 to 12."""
    height, width = a["image_hw"].tolist()
    norms = [level.norm(dim=0) for _, level in sorted(a.group("feat_lvl").items())]
    score = feature_score(norms, (height, width))
    alike(score, a["disc_score"])
    inside = foreground(a["gt_boxes"], (height, width))
    assert torch.equal(inside, a["fg_mask"].bool())
    alike(fractions_above(score, inside, a["thresholds"]), a["iof"])
    alike(fractions_above(score, ~inside, a["thresholds"]), a["iob"])

    images = a["is_assign_epochs"].unbind(1)  # (epoch, query) each
    alike(instability(images), a["is_per_transition"])

    matrix = conflict_matrix(a["cam"], float(a["cam_eps"]))
    alike(matrix, a["kl_matrix"])
    alike(head_conflict(matrix), a["kl_head_average"])


def alike(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-12)
