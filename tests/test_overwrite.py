"""Each verb beside files that are the user's:
it refuses before any work, and can be repeated on its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import detrellis
from detrellis.data.layout import DataSource, resolve
from detrellis.data.shapes import write_shapes
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import save_weights
from detrellis.errors import UserError
from detrellis.recipes.build import build
from detrellis.verbs.training import LOGS

from .small import small


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "set", train=2, val=2, size=(64, 64))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector, stored as a run stores it."""
    recipe = small("tiny", ["none"]).override(["data.size=64", "data.augment=detr"])
    source = resolve(data=data)
    folder = tmp_path_factory.mktemp("run")
    classes = source.load("train").classes
    weights = build(recipe, len(classes)).detector.state_dict()
    save_weights(folder / "best.safetensors", weights, Card(recipe, classes, source.to_dict()))
    return folder


def refused(call: Callable[[], object], mine: Path, why: str = "is there already") -> None:
    """`call` is refused while the user's file is there, which stays as it is."""
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=why) as raised:
        call()
    assert mine.name in raised.value.message
    assert mine.read_text() == "mine"
    mine.unlink()


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing is loaded or read before the refusal."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work before the refusal")

    for place in (
        "verbs.training.prepare",
        "loading.prepare_split",
        "verbs.training.load_any",
        "loading.load_any",
    ):
        monkeypatch.setattr(f"detrellis.{place}", work)
    return monkeypatch


def test_results_of_eval(run: Path, tmp_path: Path, no_work: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out" / "found.json"
    refused(lambda: detrellis.evaluate(run, results=file, workers=0), file)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: a file, not a folder\n.*--results"):
        detrellis.evaluate(run, results=tmp_path / "file" / "found.json", workers=0)
    no_work.undo()
    for _ in range(2):
        detrellis.evaluate(run, results=file, workers=0)
    assert isinstance(json.loads(file.read_text()), list)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "tensorboard/events", "best.safetensors", "last.safetensors"]
)
def test_a_new_run(data: Path, tmp_path: Path, no_work: pytest.MonkeyPatch, name: str) -> None:
    why = "there are weights" if "safetensors" in name else "is there already"
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"{name.split('/')[0]}: {why}"):
        detrellis.train("tiny", data=data, out=tmp_path)
    assert mine.read_text() == "mine"


def test_a_run_that_stopped_before_its_first_weights_may_start_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "step"}\n')
        (tmp_path / "run" / "tensorboard").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("detrellis.verbs.training.run_job", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            detrellis.train("tiny", data=data, out=tmp_path / "run", workers=0)
    assert "metrics.jsonl" in LOGS


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("detrellis.folders.time.strftime", lambda _: "20260101-120000")
    monkeypatch.setattr("detrellis.verbs.training.run_job", lambda job, *_, **__: job.out)
    folders = [detrellis.train("tiny", data=data, workers=0) for _ in range(3)]
    assert list(map(str, folders)) == [
        f"runs/tiny-20260101-120000{end}" for end in ("", "-2", "-3")
    ]


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ({"track": "nothing"}, "no such tracker"),
        ({"override": ["schedule.warmup_steps=10000"]}, "warmup"),
    ],
)
@pytest.mark.parametrize("out", [None, "new/run"])
def test_nothing_is_left_of_a_training_that_is_refused(
    refusal: dict[str, Any],
    words: str,
    out: str | None,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        detrellis.train("tiny", data=data, out=out, workers=0, **refusal)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_training_whose_validation_lacks_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it learns from has them."""
    data = write_shapes(tmp_path / "data", train=2, val=2, size=(64, 64), masks=True)
    file = data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    file.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"instances_val\.json: .*mask") as error:
        detrellis.train("tiny", data=data, override="detector.masks={}", workers=0)
    assert "detector.masks=null" in error.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_figures(run: Path, tmp_path: Path) -> None:
    from detrellis.analysis.measurements import ready, save
    from detrellis.analysis.misalignment import analyze
    from detrellis.analysis.runs import ComparedRuns

    for name in ("misalignment.png", "misalignment.json"):
        refused(lambda: ready(tmp_path, "misalignment"), tmp_path / name)
    result = analyze(ComparedRuns(run, workers=0))
    for _ in range(2):
        files = save(result, tmp_path)
    assert json.loads(files.values.read_text())["measurement"] == "misalignment"
    refused(lambda: save(result, tmp_path / "other"), tmp_path / "other" / "misalignment.png")


def test_the_demo(tmp_path: Path) -> None:
    from rich.console import Console

    from detrellis.demo import run_demo

    refused(
        lambda: run_demo(tmp_path, epochs=1, seed=0, console=Console(quiet=True)),
        tmp_path / "predictions.jpg",
    )
    assert not (tmp_path / "data").exists()


def test_a_converted_checkpoint(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.interop.test_huggingface import make

    make("detr", "small", "native").save_pretrained(tmp_path / "theirs")
    out = tmp_path / "ours"
    refused(lambda: detrellis.convert(tmp_path / "theirs", out), out / "best.safetensors")
    for _ in range(2):
        detrellis.convert(tmp_path / "theirs", out)
    (out / "best.safetensors").write_text("fine-tuned since")
    with pytest.raises(UserError, match=r"best\.safetensors: has been changed since"):
        detrellis.convert(tmp_path / "theirs", out)
    with pytest.raises(UserError, match="an input"):
        detrellis.convert(out, out, to="detrellis")


def test_a_run_without_validation_names_what_can_be_measured(
    run: Path, data: Path, tmp_path: Path
) -> None:
    source = resolve(data=data)
    alone = DataSource(source.kind, {"train": source.splits["train"]})
    with pytest.raises(
        UserError, match=r"no split `val`\n.*--split train, or name annotations: --val FILE"
    ):
        detrellis.evaluate(run, data=alone, workers=0)
    with pytest.raises(UserError, match=r"no split `test`\n.*--split train or --split val"):
        detrellis.evaluate(run, split="test", workers=0)
