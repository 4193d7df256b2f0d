"""Instance masks: from logits to run lengths, and COCO's mask AP."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detrellis.data.annotations import Annotations
from detrellis.data.formats.coco import read_coco
from detrellis.data.records import to_annotations
from detrellis.data.splits import SplitFiles
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.postprocess import Postprocess
from detrellis.types import DecoderOutput, Detections, MaskFeatures

from .arrays import Arrays, close


def check_instance_inference(a: Arrays) -> None:
    """The file's mask logits are the features, of which each query reads its own."""
    (height, width), (h, w) = a["padded_hw"].tolist(), a["image_hw"].tolist()
    padding = torch.ones(1, height, width, dtype=torch.bool)
    padding[:, :h, :w] = False
    logits, maps = a["class_logits"][None, None], a["mask_logits"][None]
    queries = logits.shape[2]
    embeds = torch.eye(queries, dtype=maps.dtype)[None, None]
    boxes = torch.zeros(1, 1, queries, 4, dtype=maps.dtype)
    output = DecoderOutput(
        logits, boxes, boxes, mask_embeds=embeds, masks=MaskFeatures(maps, (height, width), padding)
    )
    postprocess = Postprocess(a.number("top_k"), softmax=True, boxes_of_masks=True)
    (found,) = postprocess(output, a["original_hw"][None])
    seen = a["area"] > 0
    close(found.scores, a["scores"][seen], 1e-9)
    assert torch.equal(found.labels, a["labels"][seen])
    assert found.queries is not None
    assert torch.equal(found.queries, a["query"][seen])
    close(found.boxes, a["boxes"][seen], 1e-9)
    assert found.masks is not None
    assert [runs.decode() for runs in found.masks] == np.asarray(a.data["rle"])[
        seen.numpy()
    ].tolist()


def check_mask_ap(a: Arrays) -> None:
    """The file's ground truth read as a data set, and its detections as a detector gives them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gt.json")
        file.write_text(str(a.data["gt"]))
        annotations = to_annotations(read_coco("train", SplitFiles(file, (file.parent,))))
        _compare(a, annotations)


def _compare(a: Arrays, annotations: Annotations) -> None:
    evaluator = CocoEvaluator(annotations)
    found: dict[int, list[dict[str, Any]]] = {int(image): [] for image in annotations.image_ids}
    for row in json.loads(str(a.data["detections"])):
        found[row["image_id"]].append(row)
    evaluator.update(list(found), [_detections(annotations, rows) for rows in found.values()])
    for name, result in (("segm", evaluator.compute(of="mask")), ("bbox", evaluator.compute())):
        expected = [None if value < 0 else value for value in a.data[name].tolist()]
        # The file's results have no boxes: its areas of box detections are those of their masks,
        # and ours are not.
        compared = range(12) if name == "segm" else (0, 1, 2, 6, 7, 8)
        stats = list(result.stats.values())
        assert [stats[i] for i in compared] == pytest.approx(
            [expected[i] for i in compared], abs=1e-12
        )
        precision = a.data[f"{name}_precision"]
        for k, each in enumerate(result.per_class):
            assert each.ap == pytest.approx(float(precision[:, :, k].mean()), abs=1e-12)


def _detections(annotations: Annotations, rows: Sequence[dict[str, Any]]) -> Detections:
    """An image's detections; the boxes are those around the masks, as in the file's results."""
    masks = [row["segmentation"] for row in rows]
    x, y, w, h = np.array([coco_mask.toBbox(m) for m in masks]).reshape(-1, 4).T
    return Detections(
        scores=torch.tensor([row["score"] for row in rows], dtype=torch.float64),
        labels=torch.tensor(
            [annotations.classes.ids.index(row["category_id"]) for row in rows], dtype=torch.int64
        ),
        boxes=torch.from_numpy(np.stack([x, y, x + w, y + h], axis=1)),
        masks=tuple(mask["counts"].encode() for mask in masks),
    )
