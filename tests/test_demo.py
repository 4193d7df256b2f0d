"""The demo: stopped, it goes on with its run, to the picture."""

from __future__ import annotations

import io
import shlex
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from detrellis import demo
from detrellis.data.shapes import write_shapes
from detrellis.engine.console import TrainingView
from detrellis.terminal import Terminal

from .small import SMALL


def test_a_demo_that_was_stopped_goes_on_to_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(write_shapes, tmp_path / "the demo" / "data", train=4, val=2, size=(64, 64), objects=(1, 2))
    monkeypatch.setattr(demo, "write_shapes", lambda *_, **__: few())
    monkeypatch.setattr(demo, "SETTINGS", (*SMALL, "data.size=[64, 64]", "optim.batch_size=2"))
    text = io.StringIO()
    run = partial(demo.run_demo, tmp_path / "the demo", epochs=2, seed=0, console=Terminal(file=text))
    advance = TrainingView.advance

    def stop(view: TrainingView, *step: Any) -> None:
        advance(view, *step)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingView, "advance", stop)
        assert not run().finished
    said = text.getvalue().splitlines()[-1].partition("to the picture: ")[2]
    assert shlex.split(said) == ["detrellis", "demo", "--out", str(tmp_path / "the demo"), "--epochs", "2"]
    result = run()
    assert result.finished
    assert result.run == tmp_path / "the demo" / "run"
    assert (tmp_path / "the demo" / demo.PICTURE).exists()
    assert run().run == tmp_path / "the demo" / "run-2"
