"""NMS on cases made by hand, what kind a run is, and the whole analysis on small runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from detrellis.analysis.measurements import save
from detrellis.analysis.one_to_many import NMS, OneToManyResult, RunOneToMany, analyze, kind_of
from detrellis.analysis.one_to_many_figure import draw
from detrellis.api import evaluate
from detrellis.boxes import pairwise_iou
from detrellis.engine.coco_eval import EvalResult
from detrellis.errors import UserError
from detrellis.postprocess import hard_nms
from detrellis.recipes import find_recipe
from detrellis.types import Detections

from .runs import broken, compared, small_recipe, untrained


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
    """Also where only few of very many boxes are kept, which takes more than the first that are looked at."""
    found = detections(300, spread=spread)
    overlap = pairwise_iou(found.boxes, found.boxes)
    kept: list[int] = []
    for i in range(len(found.scores)):
        if not any(found.labels[i] == found.labels[j] and overlap[i, j] > threshold for j in kept):
            kept.append(i)
    ours = hard_nms(found, threshold, k)
    for one, other in zip(ours, found, strict=True):
        assert torch.equal(one, other[kept[:k]])


def test_duplicates_do_not_fill_the_places_of_others() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 5 + [[50.0, 50.0, 60.0, 60.0]])
    found = Detections(torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.1]), torch.zeros(6, dtype=torch.int64), boxes)
    assert [round(s, 1) for s in hard_nms(found, 0.7, 2).scores.tolist()] == [0.9, 0.1]
    nothing = Detections(*(t[:0] for t in found))
    assert len(hard_nms(nothing, 0.7, 2).scores) == 0


def test_a_run_is_what_its_recipe_says() -> None:
    tiny = find_recipe("tiny")
    assert kind_of(tiny) == "one-to-one"
    assert kind_of(tiny.override("loss.one_to_many=3")) == "one-to-many"
    assert kind_of(tiny.with_schemes("group=3")) == "group-wise"
    assert kind_of(tiny.override("loss.one_to_many=3").with_schemes("group=3")) == "group-wise"


def test_the_whole_analysis(shapes: Path, tmp_path: Path) -> None:
    recipes = {
        "[bold]": small_recipe("tiny"),
        "many": small_recipe("tiny", "detector.query_count=24", "loss.one_to_many=2"),
        "grouped": small_recipe("tiny").with_schemes("group=3"),
        "softmax": small_recipe("detr-r50", "loss.one_to_many=3"),
        "patterns": small_recipe("dab-detr-r50", "detector.patterns=2"),
        "default": small_recipe("conditional-detr-r50").with_schemes("group"),
    }
    runs = [untrained(tmp_path / name, shapes, recipe) for name, recipe in recipes.items()]
    result = analyze(compared(runs, batch_size=2), nms=(0.7, 0.5, 0.5))
    found = {r.name: r for r in result.runs}
    assert {n: (r.kind, r.queries, r.per_target) for n, r in found.items()} == {
        "[bold]": ("one-to-one", 12, 1),
        "many": ("one-to-many", 24, 2),
        "grouped": ("group-wise", 36, 3),
        "softmax": ("one-to-many", 12, 3),
        "patterns": ("one-to-one", 24, 1),
        "default": ("group-wise", 132, 11),
    }
    assert {n: list(r.nms) for n, r in found.items() if r.nms} == {"many": [0.5, 0.7], "softmax": [0.5, 0.7]}
    for run in runs:
        plain = evaluate(run, workers=0, device="cpu", batch_size=2)
        assert found[run.name].result.ap == pytest.approx(plain.ap, abs=1e-6)

    with pytest.raises(UserError, match=r"broken.safetensors: .* holds numbers that are not finite"):
        analyze(compared(broken(runs[0])))

    files = save(result, tmp_path / "new" / "folder")
    written = json.loads(files.values.read_text())
    assert written == result.to_dict()
    assert written["settings"] == {"nms": [0.5, 0.7], "drawn": 0.7, "split": "val"}
    assert list(written["runs"][1]["nms"]) == ["0.5", "0.7"]
    assert files.figure.stat().st_size > 10_000
    assert result.table().row_count == 6


def measured(kind: str, queries: int, ap: float | None, nms: float | None = None) -> RunOneToMany:
    counts = {"images": 1, "images_in_set": 1, "ground_truth": 1, "detections": 1}
    results = [EvalResult(stats={"AP": x, "AP50": x}, per_class=(), **counts) for x in (ap, nms)]
    after = {} if nms is None else {0.5: results[0], 0.6: results[1]}
    return RunOneToMany(f"{kind} {queries}", "run", "data", kind, queries, 1, results[0], after)  # type: ignore[arg-type]


def test_curves_go_through_the_mean_of_runs_alike() -> None:
    runs = (
        measured("group-wise", 300, 0.4),
        measured("one-to-one", 300, 0.3),
        measured("one-to-one", 100, 0.2),
        measured("one-to-one", 300, 0.2),
        measured("one-to-many", 300, 0.1, 0.35),
        measured("one-to-one", 200, None),
    )
    result = OneToManyResult(runs, (0.5, 0.6), "val")
    assert result.drawn == 0.6
    assert result.curves() == {
        "group-wise": [(300, 0.4)],
        "one-to-one": [(100, 0.2), (300, 0.2), (300, 0.3)],
        "one-to-many, NMS 0.6": [(300, 0.35)],
        "one-to-many": [(300, 0.1)],
    }
    (axes,) = draw(result).axes
    legend = axes.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == list(result.curves())
    line = next(x for x in axes.lines if list(x.get_xdata()) == [100, 300])
    assert line.get_ydata() == pytest.approx([0.2, 0.25])
    assert axes.get_xlabel() == "queries in training"
    draw(OneToManyResult(runs[-1:], NMS, "val"))  # nothing to draw


def test_what_cannot_be_measured_is_said() -> None:
    for wrong in ((), (0.5, 1.0), (0.0,)):
        with pytest.raises(UserError, match="between 0 and 1"):
            analyze(compared("run"), nms=wrong)
    with pytest.raises(UserError, match="no run to measure"):
        analyze(compared([]))
