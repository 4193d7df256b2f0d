"""What `bench` reports, and what it refuses. Speed itself is no test."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import detrellis
from detrellis import precision
from detrellis.detector import Detector
from detrellis.engine import bench
from detrellis.engine.bench import Task, bench_recipe, parse_batch_sizes, parse_size
from detrellis.errors import UserError
from detrellis.types import Detections

from ..small import CLASSES, small


@pytest.mark.parametrize("task", ["inference", "training step"])
def test_times_each_batch_size(task: Task) -> None:
    threads = torch.get_num_threads()
    found = bench_recipe(
        small("tiny"), CLASSES, batch_sizes="1,2", size="64x96", threads=1, task=task, runs=3
    )
    assert (found.recipe, found.image_size, found.threads, found.compiled) == (
        "tiny",
        (64, 96),
        1,
        False,
    )
    assert found.task == task
    assert [t.batch_size for t in found.timings] == [1, 2]
    for t in found.timings:
        assert 0 < t.fastest_ms <= t.median_ms
        assert math.isclose(t.images_per_second, t.batch_size * 1000 / t.median_ms, rel_tol=1e-3)
    assert json.loads(json.dumps(found.to_dict()))["timings"][1]["batch_size"] == 2
    assert found.table().row_count == 2
    assert "96x64 pixels" in found.about()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("amp", [True, False])
def test_says_in_which_precision_a_step_was_timed(
    monkeypatch: pytest.MonkeyPatch, amp: bool
) -> None:
    for module in (bench, precision):
        monkeypatch.setattr(module, "has_bfloat16", lambda _: True)
    seen: list[bool] = []
    detect = Detector.detect

    def watched(self: Detector, *args: Any) -> list[Detections]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return detect(self, *args)

    monkeypatch.setattr(Detector, "detect", watched)
    recipe = small("tiny").override(f"optim.amp={str(amp).lower()}")
    tasks: tuple[Task, ...] = ("training step", "inference", "half")
    step, inference, half = (
        bench_recipe(recipe, CLASSES, size=64, runs=1, warmup=0, device="cpu", task=task)
        for task in tasks
    )
    assert ("bfloat16" in step.about()) == step.bfloat16 == amp
    assert [inference.bfloat16, half.bfloat16] == seen == [False, True]
    with pytest.raises(UserError, match=r"optim\.amp"):
        detrellis.bench("tiny", half=True, train=True)


def test_says_how_deformable_attention_was_computed() -> None:
    """Where there is none, it says nothing, whatever another recipe said before."""
    deformable, dense = (
        bench_recipe(small(name), CLASSES, size=64, runs=1, warmup=0, device="cpu")
        for name in ("tiny", "detr_r50")
    )
    assert deformable.attention
    assert deformable.attention in deformable.about()
    assert dense.attention is None


def test_the_default_size_is_the_recipes() -> None:
    recipe = small("tiny").override("data.size=[64, 80]")
    assert bench_recipe(recipe, CLASSES, runs=1, warmup=0).image_size == (64, 80)


def test_python_interface() -> None:
    found = detrellis.bench(
        "tiny", classes=3, size=(64, 64), scheme="none", override="detector.queries.count=9", runs=1
    )
    assert (found.classes, found.runs, len(found.timings)) == (3, 1, 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("640", (640, 1066)), (64, (64, 107)), ("64x96", (64, 96)), ((32, 64), (32, 64))],
)
def test_sizes(text: str | int | tuple[int, int], size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "640x", "-640", "16", "640x16", (16, 640)])
def test_wrong_sizes(text: str | tuple[int, int]) -> None:
    with pytest.raises(UserError, match="image size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "0", "1,,2", "one", []])
def test_wrong_batch_sizes(text: str | list[int]) -> None:
    with pytest.raises(UserError, match="batch sizes"):
        parse_batch_sizes(text)


@pytest.mark.parametrize(
    ("how", "message"), [({"runs": 0}, "runs=0"), ({"threads": 0}, "threads=0")]
)
def test_wrong_counts(how: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_recipe(small("tiny"), CLASSES, size=64, **how)  # type: ignore[arg-type]
