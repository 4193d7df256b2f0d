"""What kind a run is, and the whole analysis on small runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detrellis.analysis.measurements import save
from detrellis.analysis.one_to_many import (
    NMS,
    OneToManyResult,
    RunOneToMany,
    analyze,
    draw,
    kind_of,
)
from detrellis.api import evaluate
from detrellis.engine.eval_result import EvalResult
from detrellis.errors import UserError
from detrellis.recipes import find_recipe

from .runs import broken, compared, small_recipe, untrained


def test_a_run_is_what_its_recipe_says() -> None:
    tiny = find_recipe("tiny")
    assert kind_of(tiny) == "one-to-one"
    assert kind_of(tiny.override("loss.one_to_many=3")) == "one-to-many"
    assert kind_of(tiny.with_schemes("group=3")) == "group-wise"
    assert kind_of(tiny.override("loss.one_to_many=3").with_schemes("group=3")) == "group-wise"


def test_the_whole_analysis(shapes: Path, tmp_path: Path) -> None:
    recipes = {
        "[bold]": small_recipe("tiny"),
        "many": small_recipe("tiny", "detector.queries.count=24", "loss.one_to_many=2"),
        "grouped": small_recipe("tiny").with_schemes("group=3"),
        "softmax": small_recipe("detr-r50", "loss.one_to_many=3"),
        "patterns": small_recipe("dab-detr-r50", "detector.queries.patterns=2"),
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
    assert {n: list(r.nms) for n, r in found.items() if r.nms} == {
        "many": [0.5, 0.7],
        "softmax": [0.5, 0.7],
    }
    for run in runs:
        plain = evaluate(run, workers=0, device="cpu", batch_size=2)
        assert found[run.name].result.ap == pytest.approx(plain.ap, abs=1e-6)

    with pytest.raises(
        UserError, match=r"broken.safetensors: .* holds numbers that are not finite"
    ):
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
