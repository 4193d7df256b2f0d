"""Every kind of network with compiled layers, one of them by a real compiler; and a run with them on
images of several sizes, which can be stopped and goes on bit for bit.

    make long TESTS=tests/soak/test_compiled.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import detrellis

from ..engine.test_resume import assert_same_run, stop_at
from ..nn.test_compiler import check_compiled
from ..small import NETWORKS, SMALL, small

SETTINGS = [*SMALL, "data.size=[64, 64]", "data.multi_scale=[0.5, 1.5]", "optim.batch_size=4"]
SETTINGS += ["optim.compile=true", "optim.ema=0", "detector.dropout=0.1"]
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
COMPILED = [name for name in NETWORKS if not name.startswith("sam_detr")]


@pytest.mark.parametrize("name", [*COMPILED, "salience_detr_r50", "ddq_dino_r50"])
def test_every_network(name: str) -> None:
    check_compiled(small(name), "aot_eager")


@COMPILER
def test_a_compiled_network() -> None:
    check_compiled(small("tiny"), "inductor")


@COMPILER
def test_a_run_goes_on(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> Path:
        out = tmp_path / name
        detrellis.train("tiny", data=shapes, out=out, override=SETTINGS, epochs=2, workers=0)
        return out

    whole = run("whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        stopped = run("stopped")
    torch._dynamo.reset()  # as in another process
    assert detrellis.resume(stopped, workers=0).finished
    assert_same_run(whole, stopped)
