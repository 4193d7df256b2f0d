"""LVIS's AP of boxes and masks, against lvis-api's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from detrellis.data.formats.coco import read_coco
from detrellis.data.records import to_annotations
from detrellis.data.splits import SplitFiles
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.types import Detections

from .arrays import Arrays


def check_lvis_eval(a: Arrays) -> None:
    """The file's ground truth read as a data set;
    boxes with 300 and 1000 detections, each class's AP, and masks.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gt.json")
        file.write_text(str(a.data["gt"]))
        annotations = to_annotations(read_coco("train", SplitFiles(file, (file.parent,))))
        for kind, limit in (("bbox", 300), ("bbox", 1000), ("segm", 300)):
            evaluator = CocoEvaluator(annotations, top_k=limit)
            found: dict[int, list[dict[str, Any]]] = {
                int(image): [] for image in annotations.image_ids
            }
            for row in json.loads(str(a.data[f"detections_{kind}"])):
                found[row["image_id"]].append(row)
            places = {category: k for k, category in enumerate(annotations.classes.ids)}
            evaluator.update(
                list(found), [_detections(rows, places, kind) for rows in found.values()]
            )
            result = evaluator.compute(of="mask" if kind == "segm" else "box")
            expected = dict(
                zip(
                    a.data[f"{kind}{limit}_names"].tolist(),
                    a.data[f"{kind}{limit}"].tolist(),
                    strict=True,
                )
            )
            assert result.frequencies is not None
            if limit == 1000:
                assert result.frequencies["AP@1000"] == pytest.approx(expected["AP"], abs=1e-12)
                continue
            ours = {
                **result.stats,
                **{n.replace("@300", ""): v for n, v in result.frequencies.items()},
            }
            assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-12)
            for k, each in enumerate(result.per_class):
                mean = float(a.data[f"{kind}{limit}_precision"][:, :, k].mean())
                assert each.ap == (None if mean < 0 else pytest.approx(mean, abs=1e-12))


def _detections(rows: list[dict[str, Any]], places: dict[int, int], kind: str) -> Detections:
    boxes = torch.tensor([row.get("bbox", [0, 0, 1, 1]) for row in rows], dtype=torch.float64).view(
        -1, 4
    )
    masks = (
        tuple(row["segmentation"]["counts"].encode() for row in rows) if kind == "segm" else None
    )
    return Detections(
        scores=torch.tensor([row["score"] for row in rows], dtype=torch.float64),
        labels=torch.tensor([places[row["category_id"]] for row in rows], dtype=torch.int64),
        boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
        masks=masks,
    )
