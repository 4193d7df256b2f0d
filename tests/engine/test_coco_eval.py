"""The evaluator against pycocotools, fed independently with dicts and the data set's own ids."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from detrellis.data.annotations import Annotations
from detrellis.data.classes import ClassMap
from detrellis.engine import coco_backend, coco_eval
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.eval_result import STATISTICS, EvalResult
from detrellis.errors import UserError
from detrellis.types import Detections

TOLERANCE = 1e-9


def make(
    rng: np.random.Generator, images: int = 12, classes: int = 4, mean_boxes: float = 4
) -> Annotations:
    """Unsorted image ids with gaps, category ids with gaps,
    crowds, areas that are not width * height, empty images.
    """
    counts = rng.poisson(mean_boxes, images) * (rng.random(images) > 0.2)
    total = int(counts.sum())
    boxes = np.column_stack(
        [
            rng.uniform(0, 200, (total, 2)),
            rng.choice([10, 40, 130], (total, 2)) * rng.uniform(0.5, 1.5, (total, 2)),
        ]
    )
    ids = np.sort(rng.choice(np.arange(1, 500), classes, replace=False))
    used = rng.choice(classes, max(1, classes - 1), replace=False)  # one class has no ground truth
    return Annotations(
        root=Path(),
        classes=ClassMap(tuple(ids.tolist()), tuple(f"c{i}" for i in ids)),
        image_ids=rng.permutation(rng.choice(10**6, images, replace=False)).astype(np.int64),
        file_names=np.array([b"x"] * images),
        sizes=np.full((images, 2), 400),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes,
        labels=rng.choice(used, total).astype(np.int64),
        crowd=rng.random(total) < 0.15,
        areas=boxes[:, 2] * boxes[:, 3] * rng.uniform(0.4, 1, total),
        ids=rng.permutation(total * 3)[:total].astype(np.int64) + 1,
    )


def detect(
    rng: np.random.Generator, a: Annotations, index: int, extra: int = 6, ties: bool = True
) -> Detections:
    """Shaken copies of the ground truth, doubles and noise;
    scores rounded so that many are equal.
    """
    own = slice(a.starts[index], a.starts[index + 1])
    xywh = np.concatenate(
        [
            a.boxes[own],
            a.boxes[own][::2],
            np.column_stack([rng.uniform(0, 200, (extra, 2)), rng.uniform(5, 150, (extra, 2))]),
        ]
    )
    xywh = xywh * rng.normal(1, 0.05, xywh.shape)
    labels = np.concatenate(
        [a.labels[own], a.labels[own][::2], rng.integers(0, len(a.classes), extra)]
    )
    scores = rng.random(len(xywh)).round(1 if ties else 6)
    order = np.argsort(-scores, kind="stable")
    xyxy = np.column_stack([xywh[:, :2], xywh[:, :2] + np.abs(xywh[:, 2:])])
    return Detections(
        torch.tensor(scores[order]).float(),
        torch.tensor(labels[order]),
        torch.tensor(xyxy[order]).float(),
    )


def reference(
    a: Annotations, shown: list[int], found: dict[int, Detections]
) -> tuple[np.ndarray, np.ndarray]:
    """Statistics and AP by class from pycocotools' documented way: loadRes, imgIds."""
    owner = np.repeat(np.arange(len(a)), np.diff(a.starts))
    columns = (
        a.ids,
        a.image_ids[owner],
        np.array(a.classes.ids)[a.labels],
        a.boxes,
        a.areas,
        a.crowd.astype(int),
    )
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    truth = [
        dict(zip(keys, row, strict=True))
        for row in zip(*(c.tolist() for c in columns), strict=True)
    ]
    results: list[dict[str, Any]] = []
    for index in shown:
        for score, label, box in zip(*(x.tolist() for x in found[index][:3]), strict=True):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append(
                {
                    "image_id": int(a.image_ids[index]),
                    "category_id": a.classes.ids[label],
                    "bbox": bbox,
                    "score": score,
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        gt, dt = COCO(), COCO()
        gt.dataset = {
            "images": [{"id": int(i)} for i in a.image_ids],
            "categories": [{"id": c} for c in a.classes.ids],
            "annotations": truth,
        }
        gt.createIndex()
        if results:
            dt = gt.loadRes(results)
        else:  # loadRes fails on an empty list
            dt.dataset = gt.dataset | {"annotations": []}
            dt.createIndex()
        evaluation = COCOeval(gt, dt, "bbox")
        evaluation.params.imgIds = [int(a.image_ids[i]) for i in shown]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    return evaluation.stats, np.array(
        [[precision[:, :, k].mean(), precision[0, :, k].mean()] for k in range(len(a.classes))]
    )


def as_numbers(result: EvalResult) -> tuple[np.ndarray, np.ndarray]:
    stats = [result.stats[name] for name in STATISTICS]
    per_class = [(c.ap, c.ap50) for c in result.per_class]
    return np.array([-1 if s is None else s for s in stats]), np.array(
        [[-1 if x is None else x for x in c] for c in per_class]
    )


def show(
    evaluator: CocoEvaluator, found: dict[int, Detections], indices: list[int], batch: int = 3
) -> None:
    ids = evaluator.annotations.image_ids
    for start in range(0, len(indices), batch):
        part = indices[start : start + batch]
        evaluator.update([int(ids[i]) for i in part], [found[i] for i in part])


def check(a: Annotations, found: dict[int, Detections], shown: list[int]) -> EvalResult:
    evaluator = CocoEvaluator(a)
    show(evaluator, found, shown)
    result = evaluator.compute()
    for got, want in zip(as_numbers(result), reference(a, shown, found), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    return result


@pytest.mark.parametrize("backend", [coco_backend._hotcoco, coco_backend._pycocotools])
@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools(seed: int, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_eval, "backend", lambda: backend)
    rng = np.random.default_rng(seed)
    a = make(rng)
    found = {i: detect(rng, a, i, ties=seed % 2 == 0) for i in range(len(a))}
    found[1] = found[1].take(torch.arange(0))
    result = check(a, found, rng.permutation(len(a)).tolist())
    assert result.stats["AP"] is not None
    assert 0.05 < result.stats["AP"] < 0.95  # not a comparison of zeros


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 8),
    classes=st.integers(1, 5),
    boxes=st.floats(0, 6),
    extra=st.integers(0, 8),
)
def test_equals_pycocotools_on_anything(
    seed: int, images: int, classes: int, boxes: float, extra: int
) -> None:
    rng = np.random.default_rng(seed)
    a = make(rng, images, classes, boxes)
    found = {i: detect(rng, a, i, extra) for i in range(images)}
    shown = rng.permutation(images)[: rng.integers(1, images + 1)].tolist()
    check(a, found, shown)


def test_a_subset_of_the_images_is_counted_as_one() -> None:
    rng = np.random.default_rng(4)
    a = make(rng)
    found = {i: detect(rng, a, i) for i in range(len(a))}
    result = check(a, found, [0, 5, 7])
    owner = np.repeat(np.arange(len(a)), np.diff(a.starts))
    assert result.ground_truth == int((np.isin(owner, [0, 5, 7]) & ~a.crowd).sum()) > 0
    assert (result.images, result.images_in_set) == (3, 12)


def test_many_detections_of_one_class() -> None:
    """COCO's limit of 100 per class and image bites here."""
    rng = np.random.default_rng(3)
    a = make(rng, images=3, classes=1, mean_boxes=60)
    found = {i: detect(rng, a, i, extra=150) for i in range(3)}
    assert max(len(d.scores) for d in found.values()) > 200
    check(a, found, [0, 1, 2])


def test_no_detections_at_all() -> None:
    a = make(np.random.default_rng(0))
    nothing = Detections(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    result = check(a, dict.fromkeys(range(len(a)), nothing), list(range(len(a))))
    assert result.ap == 0
    assert result.detections == 0
    assert result.images == len(a)


def test_nothing_shown_is_undefined_not_zero() -> None:
    result = CocoEvaluator(make(np.random.default_rng(0))).compute()
    assert set(result.stats.values()) == {None}
    assert (result.images, result.images_in_set) == (0, 12)


def test_ids_that_evaluators_stumble_over() -> None:
    """Negative ids, ids that a float cannot hold and the annotation id 0 do not change the
    numbers.
    """
    rng = np.random.default_rng(5)
    a = make(rng, images=6)
    odd = a.__class__(
        **vars(a)
        | {"image_ids": np.array([-5, 0, 2**53 + 1, 2**53, 7, 2**60]), "ids": np.arange(len(a.ids))}
    )
    found = {i: detect(rng, a, i) for i in range(6)}
    plain = a.__class__(
        **vars(a)
        | {"image_ids": np.argsort(np.argsort(odd.image_ids)) + 1, "ids": np.arange(len(a.ids)) + 1}
    )
    want = check(plain, found, list(range(6)))
    evaluator = CocoEvaluator(odd)
    show(evaluator, found, list(range(6)))
    assert evaluator.compute().stats == want.stats


def test_processes_merge_and_repeated_images_count_once() -> None:
    rng = np.random.default_rng(7)
    a = make(rng)
    found = {i: detect(rng, a, i) for i in range(len(a))}
    whole = check(a, found, list(range(len(a))))
    ranks = [CocoEvaluator(a) for _ in range(3)]
    for r, evaluator in enumerate(ranks):
        show(evaluator, found, [*range(r, len(a), 3), 0, 1])  # a distributed sampler's padding
        show(evaluator, found, [r])
    ranks[0].merge(*(e.arrays() for e in ranks[1:]))
    assert ranks[0].compute() == whole


def test_top_k_keeps_the_best() -> None:
    rng = np.random.default_rng(8)
    a = make(rng)
    found = {i: detect(rng, a, i, ties=False) for i in range(len(a))}
    shuffled = {
        i: d.take(torch.randperm(len(d.scores), generator=torch.Generator().manual_seed(i)))
        for i, d in found.items()
    }
    evaluator = CocoEvaluator(a, top_k=5)
    show(evaluator, shuffled, list(range(len(a))))
    cut = {i: d.take(torch.arange(min(5, len(d.scores)))) for i, d in found.items()}
    assert evaluator.compute() == check(a, cut, list(range(len(a))))


def test_results_json_gives_the_same_statistics_and_the_own_ids(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    a = make(rng)
    found = {i: detect(rng, a, i) for i in range(len(a))}
    found[0] = found[0].take(torch.arange(0))
    evaluator = CocoEvaluator(a)
    show(evaluator, found, list(range(len(a))))
    path = tmp_path / "results.json"
    evaluator.results_json(path)
    rows = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    assert {r["category_id"] for r in rows} <= set(a.classes.ids)
    again: dict[int, Detections] = {}
    for i, image_id in enumerate(a.image_ids.tolist()):
        own = [r for r in rows if r["image_id"] == image_id]
        xywh = torch.tensor([r["bbox"] for r in own], dtype=torch.float64).reshape(-1, 4)
        labels = torch.tensor(
            [a.classes.ids.index(r["category_id"]) for r in own], dtype=torch.int64
        )
        scores = torch.tensor([r["score"] for r in own], dtype=torch.float64)
        again[i] = Detections(
            scores, labels, torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        )
        torch.testing.assert_close(again[i].boxes, found[i].boxes.double(), rtol=0, atol=1e-9)
        assert torch.equal(scores, found[i].scores.double())
        assert torch.equal(labels, found[i].labels)
    np.testing.assert_allclose(
        reference(a, list(range(len(a))), again)[0],
        as_numbers(evaluator.compute())[0],
        rtol=0,
        atol=TOLERANCE,
    )


def test_results_json_leaves_the_old_file_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    monkeypatch.setattr(CocoEvaluator, "_write_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        CocoEvaluator(make(np.random.default_rng(0))).results_json(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_counts_and_json_round_trip() -> None:
    rng = np.random.default_rng(10)
    a = make(rng)
    found = {i: detect(rng, a, i) for i in range(len(a))}
    result = check(a, found, list(range(len(a))))
    assert (
        result.detections
        == sum(len(d.scores) for d in found.values())
        == sum(c.detections for c in result.per_class)
    )
    assert (
        result.ground_truth
        == int((~a.crowd).sum())
        == sum(c.ground_truth for c in result.per_class)
    )
    (unused,) = set(range(4)) - set(a.labels[~a.crowd].tolist())
    assert result.per_class[unused].ap is None
    assert [c.id for c in result.per_class] == list(a.classes.ids)
    assert EvalResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result


def test_boxes_beyond_what_coco_counts_are_told() -> None:
    a = make(np.random.default_rng(2), images=1, classes=1, mean_boxes=150)
    boxes = torch.from_numpy(np.hstack([a.boxes[:, :2], a.boxes[:, :2] + a.boxes[:, 2:]]))[
        ~torch.from_numpy(a.crowd)
    ]
    evaluator = CocoEvaluator(a)
    evaluator.update(
        a.image_ids.tolist(),
        [Detections(torch.ones(len(boxes)), torch.zeros(len(boxes)).long(), boxes)],
    )
    result = evaluator.compute()
    assert result.beyond == len(boxes) - 100 > 0
    assert result.ap == pytest.approx(100 / len(boxes), abs=0.01)
    assert f"{result.beyond} boxes count as missed" in str(result.table().caption)
    assert "missed" not in str(
        CocoEvaluator(make(np.random.default_rng(1))).compute().table().caption
    )


def test_tables_show_the_undefined_as_a_dash() -> None:
    result = CocoEvaluator(make(np.random.default_rng(0))).compute()
    console = Console(file=io.StringIO(), width=100)
    console.print(result.table(), result.class_table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in text for name in (*STATISTICS, *result.per_class[0].name, "0 of 12 images"))
    assert "-1" not in text
    assert text.count(" - ") == 12 + 2 * len(result.per_class)


def test_detections_that_are_not_finite_are_left_out_and_counted() -> None:
    rng = np.random.default_rng(11)
    a = make(rng)
    found = {i: detect(rng, a, i) for i in range(len(a))}
    want = check(a, found, list(range(len(a))))
    bad = Detections(
        torch.tensor([float("nan"), 0.9]),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([[0.0, 0, 9, 9], [0, 0, float("inf"), 9]]),
    )
    found[2] = Detections(*(torch.cat([x, y]) for x, y in zip(bad[:3], found[2][:3], strict=True)))
    evaluator, other = CocoEvaluator(a), CocoEvaluator(a)
    show(evaluator, found, list(range(6)))
    show(other, found, [2, *range(6, len(a))])
    evaluator.merge(evaluator.arrays(), other.arrays())
    assert evaluator.compute() == EvalResult(**vars(want) | {"dropped": 2})


def test_what_a_user_can_get_wrong_is_named() -> None:
    a = make(np.random.default_rng(0))
    one = Detections(torch.ones(1), torch.tensor([4]), torch.ones(1, 4))
    with pytest.raises(UserError, match="class index 4, but the data set has 4 classes"):
        CocoEvaluator(a).update([int(a.image_ids[0])], [one])
    with pytest.raises(UserError, match="image id 1000001 is not in the annotations"):
        CocoEvaluator(a).update([1000001], [one])


@pytest.fixture
def forgotten_backend() -> Any:
    coco_backend.backend.cache_clear()
    yield
    coco_backend.backend.cache_clear()


@pytest.mark.usefixtures("forgotten_backend")
def test_without_hotcoco_pycocotools_takes_over_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    rng = np.random.default_rng(12)
    a = make(rng)
    found = {i: detect(rng, a, i) for i in range(len(a))}
    check(a, found, list(range(len(a))))
    check(a, found, list(range(len(a))))
    assert len(caplog.records) == 1
    assert "slower" in caplog.text


@pytest.mark.usefixtures("forgotten_backend")
def test_without_either_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hotcoco", "pycocotools", "pycocotools.cocoeval"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install"):
        CocoEvaluator(make(np.random.default_rng(0))).compute()


@pytest.mark.usefixtures("forgotten_backend")
def test_computing_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(13)
    a = make(rng)
    check(a, {i: detect(rng, a, i) for i in range(len(a))}, list(range(len(a))))
    assert capfd.readouterr() == ("", "")
