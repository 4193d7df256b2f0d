"""LVIS: files without names, the lists of each image, and its AP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detrellis.data.layout import resolve
from detrellis.data.records import to_annotations
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.types import Detections

from ..sets import CocoSet


def lvis(root: Path) -> CocoSet:
    """The small set with URLs instead of names, and with lists."""
    data = CocoSet(root)
    for content in data.content.values():
        for row in content["images"]:
            name = row.pop("file_name")
            row["coco_url"] = f"http://images.cocodataset.org/{name.split('_')[0]}/{name}"
            row["neg_category_ids"], row["not_exhaustive_category_ids"] = [], []
        for category, letter in zip(content["categories"], "rcf", strict=True):
            category["frequency"] = letter
    data.content["train"]["images"][0].update(
        neg_category_ids=[90], not_exhaustive_category_ids=[3]
    )
    return data


def test_names_lists_and_letters(tmp_path: Path) -> None:
    source = resolve(lvis(tmp_path).write())
    raw = source.load("train")
    assert raw.path(0).is_file()
    annotations = to_annotations(raw)
    assert annotations.federation is not None
    assert annotations.federation.absent.tolist() == [[10, 90]]
    assert annotations.federation.not_exhaustive.tolist() == [[10, 3]]
    assert annotations.federation.frequency == {3: "r", 17: "c", 90: "f"}
    codes = {finding.code for finding in raw.findings}
    assert codes == {"federated-set"}


def perfect(root: Path) -> tuple[CocoEvaluator, CocoEvaluator]:
    annotations = to_annotations(resolve(lvis(root).write()).load("train"))
    whole, more = (CocoEvaluator(annotations) for _ in range(2))
    for i, image in enumerate(annotations.image_ids.tolist()):
        rows = slice(annotations.starts[i], annotations.starts[i + 1])
        x, y, w, h = torch.from_numpy(annotations.boxes[rows]).unbind(1)
        boxes = torch.stack([x, y, x + w, y + h], dim=1)
        labels = torch.from_numpy(annotations.labels[rows])
        whole.update([image], [Detections(torch.ones(len(labels)), labels, boxes)])
        # The third class, which nobody looked for in the images without it.
        false = torch.tensor([[1.0, 1, 9, 9]]).double()
        extra = Detections(
            torch.ones(len(labels) + 1),
            torch.cat([labels, torch.tensor([2])]),
            torch.cat([boxes, false]),
        )
        more.update(
            [image], [extra if i in (2, 3) else Detections(torch.ones(len(labels)), labels, boxes)]
        )
    return whole, more


def test_a_perfect_detector_and_classes_that_nobody_looked_for(tmp_path: Path) -> None:
    for evaluator in perfect(tmp_path):
        result = evaluator.compute(resample=True)
        assert result.ap == pytest.approx(1.0)
        assert result.frequencies is not None
        assert [
            result.frequencies[name] for name in ("APr", "APc", "APf", "AP@1000")
        ] == pytest.approx([1.0] * 4)
        assert result.from_dict(result.to_dict()) == result
        assert "LVIS" in str(result.table().title)


def test_what_is_behind_300_others_counts_at_1000(tmp_path: Path) -> None:
    annotations = to_annotations(resolve(lvis(tmp_path).write()).load("train"))
    x, y, w, h = annotations.boxes[0].tolist()
    boxes = torch.tensor([*[[0.0, 0.0, 1.0, 1.0]] * 300, [x, y, x + w, y + h]])
    evaluator = CocoEvaluator(annotations, top_k=1000)
    # 300 of one class is what LVIS looks at in any case
    others, own = 1, int(annotations.labels[0])
    scores, labels = torch.linspace(1, 0.5, 301), torch.tensor([*[others] * 300, own])
    evaluator.update([int(annotations.image_ids[0])], [Detections(scores, labels, boxes)])
    result = evaluator.compute()
    assert result.frequencies is not None
    assert result.ap == 0
    assert (result.frequencies["AP@1000"] or 0) > 0


def test_no_detection_at_all(tmp_path: Path) -> None:
    annotations = to_annotations(resolve(lvis(tmp_path).write()).load("train"))
    evaluator = CocoEvaluator(annotations)
    evaluator.update(
        [10], [Detections(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))]
    )
    assert evaluator.compute().ap is None
