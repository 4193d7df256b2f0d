"""AP of resampled images against COCO's evaluation of data sets that hold the images that often."""

from __future__ import annotations

import math

import numpy as np
import pytest

from detrellis.data.annotations import Annotations
from detrellis.engine.bootstrap import RESAMPLES, half_interval
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.eval_result import EvalResult

from .test_coco_eval import detect, make, show


def drawn(a: Annotations, images: list[int]) -> Annotations:
    """A data set of these images of `a`, each as often as it is listed."""
    rows = np.concatenate([np.arange(a.starts[i], a.starts[i + 1]) for i in images])
    counts = np.diff(a.starts)[images]
    per_box = {name: getattr(a, name)[rows] for name in ("boxes", "labels", "crowd", "areas")}
    changed = {
        "image_ids": np.arange(1, len(images) + 1),
        "file_names": a.file_names[images],
        "sizes": a.sizes[images],
        "starts": np.concatenate([[0], np.cumsum(counts)]),
        "ids": np.arange(1, len(rows) + 1),
    }
    return a.__class__(**vars(a) | per_box | changed)


@pytest.fixture(scope="module")
def evaluated() -> tuple[Annotations, dict, EvalResult]:
    """Twelve images, in the order of their ids, as draws are;
    with crowd regions, and scores without ties.
    """
    rng = np.random.default_rng(3)
    a = make(rng)
    a = a.__class__(**vars(a) | {"image_ids": np.sort(a.image_ids)})
    found = {i: detect(rng, a, i, ties=False) for i in range(len(a))}
    evaluator = CocoEvaluator(a)
    show(evaluator, found, list(range(len(a))))
    return a, found, evaluator.compute(resample=True)


def test_each_draw_is_an_evaluation_of_what_was_drawn(
    evaluated: tuple[Annotations, dict, EvalResult],
) -> None:
    a, found, result = evaluated
    assert result.resampled is not None
    assert len(result.resampled) == RESAMPLES
    draws = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    for number in (0, 1, 17, RESAMPLES - 1):
        images = np.sort(draws[number]).tolist()
        again = CocoEvaluator(drawn(a, images))
        show(again, {new: found[old] for new, old in enumerate(images)}, list(range(len(images))))
        assert result.resampled[number] == pytest.approx(again.compute().ap, abs=1e-12)


def test_the_interval_and_its_json(evaluated: tuple[Annotations, dict, EvalResult]) -> None:
    _, _, result = evaluated
    assert result.resampled is not None
    assert result.ap_interval == pytest.approx(1.959964 * np.std(result.resampled, ddof=1))
    data = result.to_dict()
    assert data["ap_interval"] == result.ap_interval
    assert "resampled" not in data
    assert EvalResult.from_dict(data).to_dict() == data  # also the interval
    assert f"AP ± {result.ap_interval:.3f} (95 %, over images)" in str(result.table().caption)


def test_without_ground_truth_nothing_is_known() -> None:
    a = make(np.random.default_rng(0), mean_boxes=0)
    evaluator = CocoEvaluator(a)
    show(
        evaluator,
        {i: detect(np.random.default_rng(i), a, i) for i in range(len(a))},
        list(range(len(a))),
    )
    assert evaluator.compute(resample=True).ap_interval is None
    assert CocoEvaluator(a).compute(resample=True).resampled is None
    assert half_interval([0.5]) is None
    assert half_interval([math.nan, 0.5, 0.7]) == pytest.approx(1.959964 * 0.1 * math.sqrt(2))
