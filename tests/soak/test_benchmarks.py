"""Every script of `benchmarks/` runs to its end, with as little work as its words allow: what it
measures then means nothing, but a name that it calls and that has moved is seen."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import detrellis
from detrellis.data.shapes import write_shapes

ROOT = Path(__file__).parents[2] / "benchmarks"
ONCE = ("--rounds", "1")
# Words of each script; DATA, RUN and OUT are a small set, a run trained on it, and a free place.
WORDS: dict[str, tuple[str, ...]] = {
    "all": ("matching",),  # which runs the others, each in a process of its own
    "coco_eval": ("--images", "100", "--per-image", "20"),
    "deformable": ("--repeats", "1"),
    "evaluation": ("--images", "50", "--per-image", "20", *ONCE),
    "exports": ("RUN", "--size", "192x192", "--rounds", "2", "--folder", "OUT"),
    "gpu": (*ONCE, "--short", "64", "--device", "cpu", "--recipe", "tiny"),
    "groups": ONCE,
    "inference": (*ONCE, "--side", "256"),
    "large_set": ("--images", "1000"),
    "linear": (),
    "loader": ("--images", "8", *ONCE),
    "lvis_evaluation": ("--images", "50"),
    "lvis_shapes": ("OUT", "--train", "20", "--val", "10"),
    "masks": ONCE,
    "matching": ONCE,
    "peer_training": ("DATA", "--epochs", "1"),
    "profile_step": ("tiny", "--size", "64x64", "--scheme", "align=1"),
    "realtime": (*ONCE, "--side", "256", "--batch", "1"),
    "rivals": ("--data", "DATA", "--out", "OUT", "--epochs", "1", "--seeds", "1"),
    "schemes": (*ONCE, "--recipe", "tiny"),
    "semantic": ONCE,
    "step": ONCE,
    "threads": ("--networks", "small", "--neighbours", "0", *ONCE, "--steps", "1"),
    "vit": (),
    "whole_cells": ("RUN", "DATA"),
}
NO_SCRIPTS = {"common", "peers"}  # what the others import
# Its photographs are of COCO, by their number, which no test has
ELSEWHERE = {"imagenet"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("benchmarks")
    data = write_shapes(folder / "data", train=12, val=6, size=(64, 64))
    run = detrellis.train("tiny", data=data, epochs=1, workers=0, out=folder / "run").run
    return {"DATA": str(data), "RUN": str(run)}


def test_no_script_is_forgotten() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {*WORDS, *NO_SCRIPTS, *ELSEWHERE}


def test_all_that_has_a_budget_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `make bench`; `deformable` has a table of its own."""
    monkeypatch.syspath_prepend(ROOT)
    budgets = {path.stem for path in ROOT.glob("*.py") if "finish(" in path.read_text()}
    assert {"deformable", *budgets - {"common"}} == set(importlib.import_module("all").NAMES)


@pytest.mark.parametrize("name", WORDS)
def test_it_runs_to_its_end(name: str, places: dict[str, str], tmp_path: Path) -> None:
    named = places | {"OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [sys.executable, ROOT / f"{name}.py", *(named.get(word, word) for word in WORDS[name])],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    assert "FAILED" not in done.stdout
