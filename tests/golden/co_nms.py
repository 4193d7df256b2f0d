"""Checks of non-maximum suppression, soft and hard, as Co-DETR applies it."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from detrellis.postprocess import hard_nms, soft_nms
from detrellis.types import Detections

from .arrays import Arrays

KIND = re.compile(r"(\w+?)__(soft_linear|hard)_0(\d+)(_noclass)?__keep")


def check_nms(a: Arrays) -> None:
    """Without the Gaussian cases: the decay that Co-DETR uses is linear, and we have no other."""
    for key, found in [(k, m) for k in a.data if (m := KIND.fullmatch(k))]:
        case, kind, threshold = found[1], found[2], float(f"0.{found[3]}")
        boxes, scores, own = (a[f"{case}__{k}"] for k in ("boxes", "scores", "labels"))
        labels = torch.zeros_like(own) if found[4] else own
        name = key.removesuffix("__keep")
        if kind == "soft_linear":
            _check_soft(a, name, soft_nms(boxes, scores, labels, threshold))
            continue
        best, order = scores.sort(descending=True)
        kept = hard_nms(Detections(best, labels[order], boxes[order]), threshold, len(best))
        _check_kept(a, name, kept.boxes, kept.scores)
        assert torch.equal(kept.labels, labels[a[key]])


def _check_soft(a: Arrays, name: str, lowered: Tensor) -> None:
    scores, order = lowered.sort(descending=True)
    order = order[scores > 0]
    assert torch.equal(order, a[f"{name}__keep"]), name
    case = name.split("__")[0]
    _check_kept(a, name, a[f"{case}__boxes"][order], scores[: len(order)])


def _check_kept(a: Arrays, name: str, boxes: Tensor, scores: Tensor) -> None:
    found = torch.cat([boxes, scores[:, None]], dim=1)
    torch.testing.assert_close(
        found, a[f"{name}__dets"], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}"
    )
