"""The benchmarks run: what the networks are called by changes, and nothing else would notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each as short as its options let it be; those that need data, a run or minutes stand apart.
SHORT = {
    "coco_eval": "--images 20 --per-image 5 --skip-pycocotools",
    "deformable": "--repeats 1",
    "evaluation": "--images 20 --per-image 5 --rounds 1",
    "gpu": "--device cpu --short 64 --rounds 1",
    "groups": "--rounds 1",
    "inference": "--rounds 1 --side 128",
    "large_set": "--images 100",
    "linear": "",
    "loader": "--images 8 --rounds 1",
    "lvis_evaluation": "--images 20",
    "masks": "--rounds 1",
    "matching": "--rounds 1",
    "profile_step": "tiny --size 64x64 --batch 1 --rows 3",
    "realtime": "--rounds 1 --side 128",
    "schemes": "--rounds 1",
    "semantic": "--rounds 1",
    "step": "--rounds 1",
    "threads": "--networks small --rounds 1 --steps 1",
    "vit": "",
}
# A report of the above; weights of others; a run; training for hours (tests/study, tests/data)
APART = {"all", "common", "imagenet", "peers", "exports", "peer_training", "rivals", "lvis_shapes"}


def test_each_benchmark_is_run_or_named() -> None:
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == SHORT.keys() | APART


@pytest.mark.parametrize("name", SHORT)
def test_it_runs(name: str, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *SHORT[name].split()]
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        words,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
