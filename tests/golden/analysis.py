"""Checks of the measurements of the papers."""

from __future__ import annotations

import pytest
import torch

from detrellis.analysis.instability import changed, instability
from detrellis.analysis.misalignment import EDGES, Misalignment, Pairs, pairs
from detrellis.boxes import cxcywh_to_xyxy

from .arrays import Arrays, close


def check_misalignment(a: Arrays) -> None:
    scores = a["logits"].sigmoid()
    boxes = cxcywh_to_xyxy(a["boxes"])
    truth = cxcywh_to_xyxy(a["gt_boxes"])
    counts = a["gt_counts"].tolist()
    images = zip(scores, boxes, a["gt_labels"].split(counts), truth.split(counts), strict=True)
    found = Pairs.joined(pairs(*image, threshold=float(a["theta"])) for image in images)
    for ours, name in (
        (found.br_query, "br_query"),
        (found.hc_query, "hc_query"),
        (found.br_rank, "br_score_rank"),
    ):
        assert torch.equal(ours, a[f"paper_{name}"]), name
    close(found.br_iou, a["paper_br_iou"], 1e-9, "IoU of BR")
    has = found.hc_query >= 0
    close(found.hc_iou[has], a["paper_hc_iou"][has], 1e-9, "IoU of HC")

    top = a["topm"].tolist()
    whole = Misalignment.of(found, top)
    assert pytest.approx(a["bins"].tolist()) == list(EDGES)
    assert list(whole.br_histogram) == a["paper_br_hist"].tolist()
    assert list(whole.hc_histogram) == a["paper_hc_hist"].tolist()
    assert whole.gap == pytest.approx(float(a["paper_mean_gap"]), abs=1e-9)
    assert whole.hit_rate == pytest.approx(float(a["paper_hit_rate"]), abs=1e-9)
    assert [whole.br_recall[m] for m in top] == pytest.approx(
        a["paper_br_recall"].tolist(), abs=1e-9
    )


def check_instability(a: Arrays) -> None:
    images = [a[f"V{i}"] for i in range(len(a.data)) if f"V{i}" in a]
    for i, v in enumerate(images):
        assert torch.equal(changed(v), a[f"is_layer{i}"]), i
    assert images
    close(instability(images), a["is_mean_per_layer"], 1e-12, "mean over images")
