"""From outputs to detections:
soft and hard NMS against plain loops, their place, and callers that get few or none.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import batched_nms

from detrellis.api import evaluate, predict
from detrellis.boxes import iou, pairwise_iou
from detrellis.postprocess import FLOOR, Postprocess, hard_nms, nms, soft_nms, soften
from detrellis.recipes.build import build
from detrellis.types import DecoderOutput, Detections

from .analysis.runs import small_recipe, untrained
from .small import CLASSES, small

SIZES = torch.tensor([[64, 96]])


def plain_soft_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """The readable reference: over and over, the best box left lowers every other one left."""
    lowered, left = torch.zeros_like(scores), list(range(len(scores)))
    scores = scores.clone()
    while left:
        best = max(left, key=lambda i: float(scores[i]))  # of equals the first
        left.remove(best)
        lowered[best] = scores[best] if scores[best] >= FLOOR else 0
        for i in left:
            overlap = iou(boxes[best], boxes[i])
            if labels[i] == labels[best] and overlap >= threshold:
                scores[i] *= 1 - overlap
    return lowered


corner, side = st.integers(0, 4), st.integers(0, 5)  # few places: equal boxes, boxes of no size
score = st.sampled_from([0.0, 0.0009, 0.001, 0.3, 0.5, 0.9, 1.0]) | st.floats(0, 1)
row = st.tuples(corner, corner, side, side, score, st.integers(0, 2))


@given(st.lists(row, max_size=14), st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
@settings(deadline=None)
def test_equals_a_plain_loop(rows: list[tuple[float, ...]], threshold: float) -> None:
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    boxes = torch.cat([table[:, :2], table[:, :2] + table[:, 2:4]], 1)
    scores = table[:, 4]
    labels = table[:, 5].long()
    found = soft_nms(boxes, scores, labels, threshold)
    torch.testing.assert_close(
        found, plain_soft_nms(boxes, scores, labels, threshold), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("classes", [1, 20])
def test_equals_a_plain_loop_in_a_crowd(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(80, 2, generator=generator) * 8
    boxes = torch.cat([low, low + 10 + 5 * torch.rand(80, 2, generator=generator)], 1)
    scores = torch.rand(80, generator=generator)
    labels = torch.randint(classes, (80,), generator=generator)
    found = soft_nms(boxes, scores, labels, 0.5)
    torch.testing.assert_close(
        found, plain_soft_nms(boxes, scores, labels, 0.5), atol=1e-6, rtol=1e-5
    )
    assert (found < scores).any()


def test_a_lowered_box_takes_its_turn_later() -> None:
    """The second is lowered below the third, which it would have lowered from where it stood."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 7.5]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64)
    expected = torch.tensor([0.9, 0.8 * (1 - 0.9) * (1 - 7.5 / 9), 0.7])
    torch.testing.assert_close(soft_nms(boxes, scores, labels, 0.8), expected)
    assert torch.equal(soft_nms(boxes, scores, torch.arange(3), 0.8), scores)


@pytest.mark.parametrize(
    ("other", "overlap"), [((0.0, 0.0, 10.0, 5.0), 0.5), ((2.0, 0.0, 10.0, 10.0), 0.8)]
)
def test_the_threshold_itself_counts(other: tuple[float, ...], overlap: float) -> None:
    boxes = torch.tensor([(0.0, 0.0, 10.0, 10.0), other])
    found = soft_nms(boxes, torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64), overlap)
    torch.testing.assert_close(found, torch.tensor([0.9, 0.8 * (1 - overlap)]))


def test_a_score_that_is_not_a_number_is_left_to_be_reported() -> None:
    """Nor does one keep the others from being compared within their classes."""
    boxes, labels = torch.tensor([[0.0, 0.0, 4.0, 4.0]] * 4), torch.tensor([0, 0, 0, 1])
    found = soften(
        Detections(torch.tensor([torch.nan, 0.9, 0.8, 0.7]), labels, boxes), (8, 8), 0.5, 10
    )
    assert found.scores.isnan().tolist() == [True, False]
    assert found.labels.tolist() == [0, 1]
    boxes[0] = torch.nan
    found = soften(Detections(torch.tensor([0.9, 0.9, 0.8, 0.7]), labels, boxes), (8, 8), 0.5, 10)
    assert found.boxes.isnan().any(1).tolist() == [True, False, False]
    assert found.labels.tolist() == [0, 0, 1]


def test_boxes_are_clipped_first() -> None:
    """Two boxes that differ outside the image only are one."""
    boxes = torch.tensor([[10.0, 10.0, 20.0, 20.0], [10.0, 10.0, 90.0, 20.0]])
    found = soften(
        Detections(torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64), boxes),
        (30, 20),
        0.8,
        10,
    )
    assert found.boxes.tolist() == [[10, 10, 20, 20]]


def output_of(queries: int = 9, classes: int = 4, seed: int = 0) -> DecoderOutput:
    """Boxes that nearly coincide."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 1, queries, classes, generator=generator)
    boxes = 0.5 + 0.02 * torch.randn(1, 1, queries, 4, generator=generator)
    return DecoderOutput(logits, boxes, torch.zeros(1, 1, queries, 8))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("top_k", [3, 9])
def test_it_stands_between_the_best_pairs_and_the_best_of_them(softmax: bool, top_k: int) -> None:
    """As many pairs as queries go in."""
    output = output_of()
    plain = Postprocess(9, softmax)
    every = plain(output, SIZES)[0]
    lowered = plain_soft_nms(every.boxes, every.scores, every.labels, 0.6)
    order = sorted((i for i in range(9) if lowered[i] > 0), key=lambda i: -float(lowered[i]))[
        :top_k
    ]
    found = replace(plain, top_k=top_k, soft_nms=0.6)(output, SIZES)[0]
    torch.testing.assert_close(found.scores, lowered[order])
    assert torch.equal(found.labels, every.labels[order])
    torch.testing.assert_close(found.boxes, every.boxes[order])
    assert not torch.equal(found.scores, every.scores[:top_k])
    raw = Postprocess(7, softmax)(output, SIZES)[0]
    assert all(torch.equal(x, y[:7]) for x, y in zip(raw[:3], every[:3], strict=True))


def test_of_half_precision_and_of_nothing() -> None:
    output = output_of()
    postprocess = Postprocess(5, soft_nms=0.6)
    half = postprocess(output.map(torch.Tensor.bfloat16), SIZES)[0]
    assert half.scores.dtype == half.boxes.dtype == torch.bfloat16
    nothing = postprocess(output._replace(logits=output.logits - 20), SIZES)[0]
    assert [tuple(t.shape) for t in nothing[:3]] == [(0,), (0,), (0, 4)]
    assert nothing.labels.dtype == torch.int64


def test_the_recipe_asks_for_it() -> None:
    recipe = small("tiny")
    assert build(recipe, CLASSES).detector.postprocess.soft_nms is None
    assert (
        build(recipe.override("detector.soft_nms=0.8"), CLASSES).detector.postprocess.soft_nms
        == 0.8
    )


# NMS


def detections(count: int, seed: int = 0, spread: float = 100.0) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * spread
    boxes = torch.cat([corners, corners + 20 + 10 * torch.rand(count, 2, generator=generator)], 1)
    scores = torch.rand(count, generator=generator).sort(descending=True).values
    return Detections(scores, torch.randint(3, (count,), generator=generator), boxes)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("k", [1, 5, 40, 1000])
@pytest.mark.parametrize("spread", [2.0, 100.0])
def test_nms_is_greedy_within_each_class(threshold: float, k: int, spread: float) -> None:
    """Also where only few of very many boxes are kept,
    which takes more than the first that are looked at.
    """
    found = detections(300, spread=spread)
    overlap = pairwise_iou(found.boxes, found.boxes)
    kept: list[int] = []
    for i in range(len(found.scores)):
        if not any(found.labels[i] == found.labels[j] and overlap[i, j] > threshold for j in kept):
            kept.append(i)
    ours = hard_nms(found, threshold, k)
    for one, other in zip(ours[:3], found[:3], strict=True):
        assert torch.equal(one, other[kept[:k]])


def test_duplicates_do_not_fill_the_places_of_others() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 5 + [[50.0, 50.0, 60.0, 60.0]])
    found = Detections(
        torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.1]), torch.zeros(6, dtype=torch.int64), boxes
    )
    assert [round(s, 1) for s in hard_nms(found, 0.7, 2).scores.tolist()] == [0.9, 0.1]
    nothing = found.take(torch.arange(0))
    assert len(hard_nms(nothing, 0.7, 2).scores) == 0


@pytest.mark.parametrize("most", [1, 20, 1000])
def test_trying_some_boxes_first_changes_nothing(most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(600, 2, generator=generator) * 16
    boxes = torch.cat([low, low + 20 + torch.rand(600, 2, generator=generator) * 20], dim=1)
    scores = torch.rand(600, generator=generator).sort(descending=True).values
    group = torch.randint(2, (600,), generator=generator)
    kept = batched_nms(boxes, scores, group, 0.5)
    assert kept[:20].max() >= 60  # beyond the first tried
    assert torch.equal(nms(boxes, scores, group, 0.5, most, first=3 * most), kept[:most])


# With a run


@pytest.fixture(scope="module")
def runs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same random weights without it and with it;
    many of their boxes are duplicates of each other.
    """
    place = tmp_path_factory.mktemp("runs")
    plain, soft = (small_recipe("tiny", f"detector.soft_nms={t}") for t in ("null", 0.5))
    return untrained(place / "plain", shapes, plain), untrained(place / "soft", shapes, soft)


def test_a_run_keeps_it(runs: tuple[Path, Path], shapes: Path) -> None:
    pictures = shapes / "images" / "val"
    plain, soft = (predict(run, pictures, threshold=0, device="cpu") for run in runs)
    for one, other in zip(plain, soft, strict=True):
        assert other.scores == sorted(other.scores, reverse=True)
        assert sum(other.scores) < sum(one.scores)


def test_hard_nms_takes_its_place(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Whose gain tells how many duplicates there were:
    it must see all of them, with the scores they had.
    """
    files = [tmp_path / f"{run.name}.json" for run in runs]
    for run, file in zip(runs, files, strict=True):
        evaluate(run, nms=0.5, results=file, workers=0, device="cpu")
    assert len(files[0].read_text()) > 100
    assert files[0].read_text() == files[1].read_text()


def test_images_without_any_detection(
    runs: tuple[Path, Path], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Postprocess, "scores", lambda _, output: output.logits[-1] * 0)
    result = evaluate(runs[1], results=tmp_path / "none.json", workers=0, device="cpu")
    assert (result.images, result.detections, result.ap) == (5, 0, 0)
    assert json.loads((tmp_path / "none.json").read_text()) == []
    found = predict(
        runs[1], shapes / "images" / "val", threshold=0, out=tmp_path / "pictures", device="cpu"
    )
    assert [p.boxes for p in found] == [[]] * 5
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 5
