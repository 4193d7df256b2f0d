"""COCO's mask AP: against pycocotools, over processes, and in the results file."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detrellis.data.annotations import Annotations
from detrellis.data.layout import resolve
from detrellis.data.masks import run_lengths
from detrellis.data.records import to_annotations
from detrellis.engine import coco_backend
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.eval_result import EvalResult
from detrellis.errors import UserError
from detrellis.types import Detections

from ..data.sets import CocoSet

SIZE = (32, 48)


def ellipse(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    cx, cy, rx, ry = rng.uniform(8, 40), rng.uniform(8, 24), rng.uniform(4, 16), rng.uniform(4, 12)
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1


def set_of(root: Path) -> CocoSet:
    """Polygons and run lengths, a crowd region, and areas that are not the masks'."""
    rng, data = np.random.default_rng(1), CocoSet(root)
    for number, row in enumerate(data.content["train"]["annotations"]):
        runs = coco_mask.encode(np.asfortranarray(ellipse(rng).astype(np.uint8)))
        if number % 2:
            row["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
        row["area"] = float(rng.uniform(50, 2000))
    data.add_box(1)
    data.content["train"]["annotations"][-1]["iscrowd"] = 1
    return data


def found_in(rng: np.random.Generator, classes: int) -> Detections:
    masks = [ellipse(rng) for _ in range(9)]
    packed = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in masks]
    x, y, w, h = np.array([coco_mask.toBbox(p) for p in packed]).T
    boxes = torch.from_numpy(np.stack([x, y, x + w, y + h], axis=1))
    scores = torch.from_numpy(np.sort(rng.random(9).round(1))[::-1].copy())
    return Detections(
        scores,
        torch.from_numpy(rng.integers(0, classes, 9)),
        boxes,
        tuple(p["counts"] for p in packed),
    )


def evaluators(root: Path, parts: int = 1) -> tuple[Annotations, list[CocoEvaluator], CocoSet]:
    data = set_of(root)
    annotations = to_annotations(resolve(data.write()).load("train"))
    rng, ids = np.random.default_rng(0), annotations.image_ids.tolist()
    found = [found_in(rng, len(annotations.classes)) for _ in ids]
    shared = [CocoEvaluator(annotations, top_k=7) for _ in range(parts)]
    for number, (image, each) in enumerate(zip(ids, found, strict=True)):
        shared[number % parts].update([image], [each])
    return annotations, shared, data


@pytest.mark.parametrize("backend", [coco_backend._hotcoco, coco_backend._pycocotools])
def test_equals_pycocotools_on_the_files(
    tmp_path: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set's own file and the results file,
    without the boxes that pycocotools would take the areas of.
    """
    monkeypatch.setattr("detrellis.engine.coco_eval.backend", lambda: backend)
    _, (evaluator,), data = evaluators(tmp_path)
    evaluator.results_json(tmp_path / "results.json")
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 7 * 5
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data.file("train")))
        for kind, results in (
            ("segm", [{k: v for k, v in r.items() if k != "bbox"} for r in rows]),
            ("bbox", rows),
        ):
            expected = COCOeval(truth, truth.loadRes(results), kind)
            expected.evaluate()
            expected.accumulate()
            expected.summarize()
            result = evaluator.compute(of="mask" if kind == "segm" else "box")
            stats = [-1 if value is None else value for value in result.stats.values()]
            assert stats == pytest.approx(expected.stats.tolist(), abs=1e-12)
            assert result.of == ("mask" if kind == "segm" else "box")
    assert evaluator.kind == "mask"


def test_processes_merge_their_masks(tmp_path: Path) -> None:
    _, (alone,), _ = evaluators(tmp_path / "a")
    _, (first, second), _ = evaluators(tmp_path / "b", parts=2)
    first.merge(second.arrays(), second.arrays())
    assert first.compute(of="mask").stats == alone.compute(of="mask").stats
    assert len(first.arrays().masks or ()) == len(first.arrays().rows) == 7 * 5


def test_boxes_beside_masks(tmp_path: Path) -> None:
    _, (evaluator,), _ = evaluators(tmp_path)
    boxes = evaluator.compute(resample=True)
    result = replace(evaluator.compute(resample=True, of="mask"), boxes=boxes)
    read = EvalResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert read == replace(result, resampled=None, boxes=replace(boxes, resampled=None))
    assert [column.header for column in result.class_table().columns][:4] == [
        "class",
        "AP",
        "AP50",
        "box AP",
    ]
    assert result.table().title == "COCO mask AP and AR"
    assert f"box AP {boxes.ap:.3f}" in str(result.table().caption)


def test_an_object_without_a_mask_is_named(tmp_path: Path) -> None:
    annotations, _, data = evaluators(tmp_path)
    del data.content["train"]["annotations"][-1]["segmentation"]  # a crowd region may go without
    data.write()
    evaluator = CocoEvaluator(annotations)
    evaluator.update([int(annotations.image_ids[0])], [found_in(np.random.default_rng(0), 2)])
    assert evaluator.compute(of="mask").ap is not None
    data.box(1)["segmentation"] = []
    data.write()
    with pytest.raises(UserError, match=r"annotation \d+ in .* has no mask"):
        evaluator.compute(of="mask")
    assert CocoEvaluator(replace(annotations, segmentations=None)).kind == "box"


def test_masks_that_were_read_are_not_read_again(tmp_path: Path) -> None:
    annotations, (evaluator,), _ = evaluators(tmp_path)
    again = CocoEvaluator(replace(annotations, lines=None), top_k=7, truth=run_lengths(annotations))
    again.merge(evaluator.arrays())
    assert again.compute(of="mask").stats == evaluator.compute(of="mask").stats
