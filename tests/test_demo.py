"""The demo: stopped, it goes on with its run, to the picture."""

from __future__ import annotations

import shlex
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from detrellis import demo
from detrellis.cli import main
from detrellis.data.shapes import write_shapes
from detrellis.engine.console import TrainingView

from .small import SMALL


@pytest.mark.parametrize(
    ("number", "code", "masks"), [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--masks"])]
)
def test_a_demo_that_was_stopped_goes_on_to_the_picture(
    number: signal.Signals,
    code: int,
    masks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "the demo"
    few = partial(
        write_shapes, out / "data", train=4, val=2, size=(64, 64), objects=(1, 2), masks=bool(masks)
    )
    monkeypatch.setattr(demo, "write_shapes", lambda *_, **__: few())
    monkeypatch.setattr(demo, "SETTINGS", (*SMALL, "data.size=[64, 64]", "optim.batch_size=2"))
    advance = TrainingView.advance

    def stop(view: TrainingView, *step: Any) -> None:
        advance(view, *step)
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingView, "advance", stop)
        said = run(["demo", "--out", str(out), "--epochs", "2", *masks], code, monkeypatch, capsys)
    assert said.count("Stopped") == 1
    assert f"Stopped by {number.name} after step 1, and saved." in said
    words = shlex.split(said.partition("to the picture: ")[2].splitlines()[0])
    assert words == ["detrellis", "demo", "--out", str(out), *masks, "--epochs", "2"]
    run(words[1:], 0, monkeypatch, capsys)
    assert [folder.name for folder in sorted(out.glob("run*"))] == ["run"]
    assert (out / demo.PICTURE).exists()
    if number == signal.SIGINT:
        run(words[1:], 0, monkeypatch, capsys)
        assert (out / "run-2").exists()


def run(
    words: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What the command says in all, in one long line each, from its start to this exit code."""
    monkeypatch.setattr("sys.argv", ["detrellis", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code
    out, err = capsys.readouterr()
    return out + err
