"""The Python interface refuses what the command line refuses, by the same ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import detrellis
from detrellis.analysis import groups, misalignment
from detrellis.analysis.runs import ComparedRuns
from detrellis.arguments import BatchSize, Iou, Range, Seed, Workers, checked, limits
from detrellis.cli import app
from detrellis.errors import UserError


@checked
def verb(
    place: str | Path,
    *,
    nms: Iou | None = None,
    size: BatchSize = 1,
    metric: Literal["coco", "voc"] = "coco",
    tell: Literal["raise", "skip"] | Callable[[str], None] = "raise",
    progress: bool = False,
    hidden: NotHere | None = None,  # type: ignore[name-defined] # noqa: F821
    workers: Workers = 2,
    names: list[str] | None = None,
) -> str:
    """A verb."""
    return f"{place} {nms} {size}"


def test_what_is_allowed_passes() -> None:
    assert verb("here", nms=0.5, size=np.int64(3)) == "here 0.5 3"  # type: ignore[arg-type]
    assert (
        verb(Path("here"), nms=1, workers=0, names=["a"], tell=print, progress=True, hidden=7)
        == "here 1 1"
    )
    assert verb.__doc__ == "A verb."
    with pytest.raises(TypeError, match="place"):
        verb()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "message", "remedy"),
    [
        ({"nms": 2}, "verb: nms=2", "Give a number, from 0 to 1."),
        ({"nms": -0.1}, "nms=-0.1", "from 0 to 1"),
        ({"nms": math.nan}, "nms=nan", "from 0 to 1"),
        ({"nms": "0.5"}, "nms='0.5'", "Give a number"),
        ({"nms": True}, "nms=True", "Give a number"),
        ({"size": 0}, "size=0", "Give a whole number, 1 or more."),
        ({"size": 1.5}, "size=1.5", "Give a whole number"),
        ({"workers": -1}, "workers=-1", "Give a whole number, 0 or more."),
        ({"metric": "vok"}, "metric='vok'", "Did you mean 'voc'? Known: coco, voc."),
        ({"metric": None}, "metric=None", "Known: coco, voc."),
        (
            {"tell": "skp"},
            "tell='skp'",
            "Did you mean 'skip'? Known: raise, skip. Or: Give a function.",
        ),
        ({"progress": "no"}, "progress='no'", "True or False"),
        ({"names": "a,b"}, "names='a,b'", "Give a list"),
        ({"worker": 1}, "verb: unknown argument 'worker'", "Did you mean 'workers'?"),
    ],
)
def test_what_is_not_is_refused_by_name(given: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(UserError) as raised:
        verb("here", **given)
    assert message in raised.value.message
    assert remedy in raised.value.remedy


def test_a_path_is_text_or_a_path() -> None:
    with pytest.raises(UserError, match=r"verb: place=7\n  Give text\. Or: Give a path\."):
        verb(7)  # type: ignore[arg-type]


def test_options_have_the_same_ranges() -> None:
    assert limits(Iou) == {"min": 0, "max": 1}
    assert limits(Annotated[int, Range(3)]) == {"min": 3, "max": None}
    assert limits(Seed)["max"] == 2**63 - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: detrellis.evaluate("run", metric="foo"), "evaluate: metric='foo'"),  # type: ignore[call-overload]
        (lambda: detrellis.evaluate("run", batch_size=0), "batch_size=0"),
        (lambda: detrellis.evaluate("run", nms=2), "nms=2"),
        (lambda: detrellis.evaluate("run", split="dev"), "split='dev'"),  # type: ignore[call-overload]
        (lambda: detrellis.evaluate("run", spilt="test"), "Did you mean 'split'"),  # type: ignore[call-overload]
        (lambda: detrellis.train("tiny", epochs=0), "epochs=0"),
        (lambda: detrellis.train("tiny", epochs="all"), "Known: auto"),  # type: ignore[arg-type]
        (lambda: detrellis.resume("run", epochs="auto"), "epochs='auto'"),  # type: ignore[arg-type]
        (lambda: detrellis.train("tiny", epoch=1), "Did you mean 'epochs'"),  # type: ignore[call-arg]
        (lambda: detrellis.train("tiny", workers=-1), "workers=-1"),
        (lambda: detrellis.train("tiny", seed=-1), "seed=-1"),
        (lambda: detrellis.train("tiny", scale="big"), "Known: tiny"),  # type: ignore[arg-type]
        (lambda: detrellis.resume("run", workers=-1), "workers=-1"),
        (lambda: detrellis.predict("run", "photo.jpg", threshold=-1), "threshold=-1"),
        (lambda: detrellis.predict("run", "photo.jpg", threshold=math.nan), "threshold=nan"),
        (lambda: detrellis.predict("run", "photo.jpg", batch_size=0), "batch_size=0"),
        (lambda: detrellis.load("tiny", classes=0), "classes=0"),
        (lambda: detrellis.load("tiny", device="gpu"), "device 'gpu' is none of cpu"),
        (lambda: detrellis.load("tiny", device="hpu"), "device 'hpu' is none of cpu"),
        (lambda: detrellis.load("tiny", device="meta"), "device 'meta' is none of cpu"),
        (lambda: detrellis.load("tiny", device="cuda:99"), "device 'cuda:99' cannot be used"),
        (lambda: detrellis.info("tiny", classes=-1), "classes=-1"),
        (lambda: detrellis.bench("tiny", runs=0), "runs=0"),
        (lambda: detrellis.bench("tiny", run=1), "Did you mean 'runs'"),  # type: ignore[call-arg]
        (lambda: detrellis.convert("run", "out", to="onnx"), "to='onnx'"),  # type: ignore[arg-type]
        (lambda: misalignment.analyze(ComparedRuns("run"), threshold=7), "threshold=7"),
        (lambda: ComparedRuns("run", batch_size=0), "batch_size=0"),
        (lambda: groups.analyze(ComparedRuns("run"), grids=8), "Did you mean 'grid'"),  # type: ignore[call-arg]
    ],
)
def test_every_verb_is_checked(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as raised:
        call()
    assert message in str(raised.value)


def test_a_device_that_torch_does_not_have_is_told_in_a_line() -> None:
    with pytest.raises(UserError) as raised:
        detrellis.load("tiny", device="xpu" if torch.backends.mps.is_available() else "mps")
    assert "cannot be used" in str(raised.value)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    "words",
    [
        ["train", "tiny", "--seed", "-1"],
        ["train", "tiny", "--workers", "-1"],
        ["train", "tiny", "--epochs", "0"],
        ["train", "tiny", "--epochs", "all"],
        ["eval", "run", "--workers", "-1"],
        ["predict", "run", "x.jpg", "--batch", "0"],
        ["check", "--workers", "0"],
        ["demo", "--seed", "-1"],
    ],
)
def test_the_command_line_too(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "Invalid value" in result.output
