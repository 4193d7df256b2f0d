"""What `bench` reports, and what it refuses. Speed itself is no test."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import detrellis
from detrellis import precision
from detrellis.detector import Detector
from detrellis.engine import bench
from detrellis.engine.bench import BenchResult, Task, bench_recipe, parse_batch_sizes, parse_size
from detrellis.errors import UserError
from detrellis.types import Detections

from ..small import CLASSES, small
from ..test_cli import call


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
    assert (found.timings[0].eager_ms, found.timings[0].speedup, found.verdict()) == (None,) * 3
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


@pytest.mark.parametrize(("compiled", "eager", "speedup"), [(2.0, 1.0, 0.5), (1.0, 3.0, 3.0)])
def test_what_is_compiled_takes_turns_with_eager(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compiled: float,
    eager: float,
    speedup: float,
) -> None:
    """And where it is slower, that is said. A graph that counts its calls stands for compiled code,
    and a clock for the machine.
    """
    calls, seen = [0], list[bool]()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        def call(*inputs: Tensor) -> Any:
            calls[0] += 1
            return graph(*inputs)

        return call

    def seconds(run: Callable[[], object], _: torch.device) -> float:
        before = calls[0]
        run()
        seen.append(calls[0] > before)
        return compiled if seen[-1] else eager

    monkeypatch.setattr(bench, "_compile", lambda m, *_: m.detector.compile(backend=backend))
    monkeypatch.setattr(bench, "seconds_of", seconds)
    found = bench_recipe(
        small("tiny"), CLASSES, size=64, compiled=True, runs=2, warmup=1, device="cpu"
    )
    assert seen == [False, True] * 3
    (timing,) = found.to_dict()["timings"]
    assert timing["median_ms"] == compiled * 1000
    assert (timing["eager_ms"], timing["speedup"]) == (eager * 1000, speedup)
    Console(width=120).print(found.table())
    shown = capsys.readouterr().out
    assert f"{eager * 1000} ms" in shown
    assert f"{speedup:.2f}x" in shown
    verdict = found.verdict() or ""
    assert ("leave --compile out" in verdict) == (speedup < 1)
    torch._dynamo.reset()


def test_the_command_says_where_compiled_is_slower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BenchResult, "verdict", lambda _: "leave it out")
    words = ("bench", "tiny", "--size", "32x32", "--runs", 1, "-o", "detector.queries.count=9")
    assert call(*words, capsys=capsys).splitlines()[-1] == "leave it out"


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
