"""Checks of non-maximum suppression, soft and hard, as Co-DETR applies it."""

from __future__ import annotations

import torch
from torch import Tensor

from detrellis.boxes import soft_nms
from detrellis.engine.evaluate import suppress
from detrellis.types import Detections

from .arrays import Arrays

SOFT = {"soft_linear_08": 0.8, "soft_linear_05": 0.5}
HARD = {"hard_07": 0.7, "hard_06": 0.6}


def check_nms(a: Arrays) -> None:
    """Without the Gaussian cases: the decay that Co-DETR uses is linear, and we have no other."""
    for case in sorted({k.split("__")[0] for k in a.data}):
        boxes, scores, labels = (a[f"{case}__{k}"] for k in ("boxes", "scores", "labels"))
        for name, threshold in SOFT.items():
            _check_soft(a, f"{case}__{name}", soft_nms(boxes, scores, labels, threshold))
        _check_soft(a, f"{case}__soft_linear_08_noclass", soft_nms(boxes, scores, torch.zeros_like(labels), 0.8))
        best, order = scores.sort(descending=True)
        for name, threshold in HARD.items():
            kept = suppress(Detections(best, labels[order], boxes[order]), threshold, len(best))
            _check_kept(a, f"{case}__{name}", kept.boxes, kept.scores)
            assert torch.equal(kept.labels, labels[a[f"{case}__{name}__keep"]])


def _check_soft(a: Arrays, name: str, lowered: Tensor) -> None:
    scores, order = lowered.sort(descending=True)
    order = order[scores > 0]
    assert torch.equal(order, a[f"{name}__keep"]), name
    case = name.split("__")[0]
    _check_kept(a, name, a[f"{case}__boxes"][order], scores[: len(order)])


def _check_kept(a: Arrays, name: str, boxes: Tensor, scores: Tensor) -> None:
    found = torch.cat([boxes, scores[:, None]], dim=1)
    torch.testing.assert_close(found, a[f"{name}__dets"], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
