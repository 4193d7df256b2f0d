"""Files that are broken, of another kind or of another run:
one clear error that names the file, for every verb.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import detrellis
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import OLDER, load_weights, save_run, save_weights
from detrellis.engine.resume import IMAGES, load_run
from detrellis.errors import Advice, UserError
from detrellis.folders import held
from detrellis.outputs import LOCK
from detrellis.recipes import find_recipe
from detrellis.recipes.build import build
from detrellis.recipes.migrate import FORMAT

from ..small import SMALL

RECIPE = [*SMALL, "detector.width=32", "optim.ema=0"]
Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's files, of a detector that nobody has trained."""
    run = tmp_path_factory.mktemp("good") / "run"
    from detrellis.data.classes import ClassMap

    recipe = find_recipe("tiny").override(RECIPE)
    model = build(recipe, 2)
    card = Card(recipe, ClassMap((1, 2), ("cat", "dog")), {"kind": "coco", "splits": {}})
    save_run(
        run,
        {"model": model.state_dict(), IMAGES: {}, "epoch": 0, "step": 1},
        model.detector.state_dict(),
        card,
    )
    return run


def edited(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Break:
    """The weights with other tensors, or another card."""

    def edit(run: Path) -> None:
        path = run / "last.safetensors"
        tensors, metadata = load_file(path), load_weights(path)[1].to_metadata()
        card = json.loads(metadata["detrellis"])
        change(tensors, card)
        path.unlink()
        form = str(card.pop("format", FORMAT))
        save_file(tensors, path, {"detrellis": json.dumps(card), "format": form} if card else None)

    return edit


def floats(tensors: dict[str, Any]) -> str:
    return next(name for name in sorted(tensors) if tensors[name].is_floating_point())


BROKEN: dict[str, tuple[Break, str]] = {
    "no tensor": (edited(lambda t, c: t.pop(next(iter(sorted(t))))), "is missing"),
    "shape": (
        edited(lambda t, c: t.update({min(t): torch.zeros(7, 7)})),
        r"has the shape \(7, 7\), not",
    ),
    "not finite": (
        edited(lambda t, c: t.update({(k := floats(t)): t[k] * torch.nan})),
        "are not finite",
    ),
    "extra": (edited(lambda t, c: t.update(extra=torch.zeros(1))), "extra is no part of it"),
    "no card": (edited(lambda t, c: c.clear()), "without a Detrellis card"),
    "broken card": (edited(lambda t, c: c.pop("classes")), r"its card cannot be read"),
    "newer format": (
        edited(lambda t, c: c.update(format=FORMAT + 1, version="3.0")),
        r"written by a newer Detrellis \(3.0\)",
    ),
    "newer recipe": (
        edited(lambda t, c: c["recipe"].update(novelty=1) or c.update(version="9.1.0")),
        r"written by a newer Detrellis \(9.1.0\); this is",
    ),
    "cut off": (lambda run: cut(run / "last.safetensors", 5000), "not a whole checkpoint"),
    "empty": (lambda run: cut(run / "last.safetensors", 0), r"an empty file \(0 bytes\)"),
    "garbage": (
        lambda run: (run / "last.safetensors").write_bytes(b"hello " * 99) and None,
        "not a whole checkpoint",
    ),
}


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


@pytest.mark.parametrize("kind", BROKEN)
def test_weights(run: Path, tmp_path: Path, kind: str) -> None:
    """The same words from all verbs, and nothing is written."""
    spoil, words = BROKEN[kind]
    spoil(run)
    (tmp_path / "photo.jpg").touch()
    verbs: tuple[Callable[[], object], ...] = (
        lambda: detrellis.load(run),
        lambda: detrellis.evaluate(run / "last.safetensors"),
        lambda: detrellis.convert(run, tmp_path / "out"),
        lambda: detrellis.train(weights=run, data=tmp_path, out=tmp_path / "new"),
    )
    for verb in verbs:
        with pytest.raises(UserError, match=words) as error:
            verb()
        assert "last.safetensors" in error.value.message
        assert error.value.remedy
        assert "weights_only" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "photo.jpg"}


def test_the_other_file_of_a_run_is_named(run: Path) -> None:
    shutil.copy(run / "last.safetensors", run / "best.safetensors")
    cut(run / "best.safetensors", 100)
    with pytest.raises(UserError, match=r"best\.safetensors: not a whole") as error:
        detrellis.load(run)
    assert str(run / "last.safetensors") in error.value.remedy


class Anything:
    """An object that a pickle can hold."""


def state(change: Callable[[dict[str, Any]], Any]) -> Break:
    def edit(run: Path) -> None:
        content = torch.load(run / "last.state.pt", weights_only=True)
        torch.save(change(content) or content, run / "last.state.pt")

    return edit


STATES: dict[str, tuple[Break, str]] = {
    "cut off": (lambda run: cut(run / "last.state.pt", 5000), r"last.state.pt: not a whole file"),
    "empty": (
        lambda run: cut(run / "last.state.pt", 0),
        r"last.state.pt: an empty file \(0 bytes\)",
    ),
    "garbage": (
        lambda run: (run / "last.state.pt").write_bytes(b"hello" * 99) and None,
        "not a whole file",
    ),
    "objects": (
        state(lambda s: {"model": Anything()}),
        r"holds Python objects besides tensors \([\w.]*Anything\)",
    ),
    "a list": (state(lambda s: [1, 2]), "not the state of a run"),
    "no key": (state(lambda s: s.pop("step") and None), "'step' is missing"),
    "no card": (state(lambda s: s.pop("card") and s.update(epoch=7)), "'card' is missing"),
    "another run's": (
        state(
            lambda s: s["card"].update(detrellis=s["card"]["detrellis"].replace('"cat"', '"cow"'))
        ),
        "belong to different runs",
    ),
    "newer": (state(lambda s: s["card"].update(format="9")), "written by a newer Detrellis"),
    "none": (
        lambda run: (run / "last.state.pt").unlink(),
        "nothing to resume: last.state.pt is missing",
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_states(run: Path, kind: str) -> None:
    spoil, words = STATES[kind]
    spoil(run)
    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir() if p.name != LOCK}
    with pytest.raises(UserError, match=words) as error:
        detrellis.resume(run)
    assert error.value.remedy
    assert "weights_only" not in str(error.value)
    if kind not in ("newer", "another run's"):
        assert f"train --weights {run}" in error.value.remedy
    assert {p.name: p.stat().st_mtime_ns for p in run.iterdir() if p.name != LOCK} == before


@pytest.mark.parametrize("left", [5000, 0, None])
def test_the_state_before_a_torn_one_is_taken(run: Path, left: int | None) -> None:
    state, last = load_run(run)[0], run / "last.state.pt"
    (run / "previous.state.pt").hardlink_to(last)
    whole = last.read_bytes()
    last.unlink()
    if left is not None:
        last.write_bytes(whole[:left])
    with pytest.warns(
        Advice, match=r"goes on from the state before it, previous\.state\.pt, after step 1"
    ):
        again, _ = load_run(run)
    assert again[OLDER]
    assert again["model"].keys() == state["model"].keys()


def test_the_best_weights_of_another_run(run: Path) -> None:
    tensors, card = load_weights(run / "last.safetensors")
    save_weights(run / "best.safetensors", tensors, replace(card, seed=5))
    with pytest.raises(
        UserError, match=r"last\.state\.pt and best\.safetensors belong to different runs"
    ) as error:
        load_run(run)
    assert "move it away" in error.value.remedy
    (run / "best.safetensors").unlink()
    load_run(run)


def test_a_second_run_in_a_folder_is_refused(run: Path, shapes: Path, tmp_path: Path) -> None:
    with held(run), pytest.raises(UserError, match=r"run: process .* writes here"):
        detrellis.resume(run)
    with (
        held(tmp_path / "new", new=True),
        pytest.raises(UserError, match=r"new: process .* writes here"),
    ):
        detrellis.train("tiny", data=shapes, out=tmp_path / "new", override=RECIPE)


def test_a_state_that_does_not_fit_its_recipe(run: Path, shapes: Path, tmp_path: Path) -> None:
    """Its own card says what should be in it."""
    out = tmp_path / "trained"
    detrellis.train(
        "tiny", data=shapes, out=out, override=[*RECIPE, "data.size=[64, 64]"], epochs=1, workers=0
    )
    whole = (out / "last.state.pt").read_bytes()
    for change, words in (
        (lambda s: s["model"].pop(min(s["model"])) is None, "Missing key"),
        (
            lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
            "moments have other shapes",
        ),
        (lambda s: s.pop("watch") is None, "'watch' is missing"),
    ):
        (out / "last.state.pt").write_bytes(whole)
        state(lambda s, change=change: change(s) and None)(out)
        with pytest.raises(UserError, match=f"does not fit its run: .*{words}"):
            detrellis.resume(out, workers=0)


def test_places_that_are_no_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a file, and a run is a folder") as error:
        detrellis.resume(run / "last.safetensors")
    assert f"--resume {run}" in error.value.remedy
    with pytest.raises(UserError, match="no such run"):
        detrellis.resume(tmp_path / "nowhere")
    state(lambda s: s.update(optimizer={}))(run)
    with pytest.raises(
        UserError, match=r"last\.state\.pt: the state of a run, not its weights"
    ) as error:
        detrellis.load(run / "last.state.pt")
    assert str(run) in error.value.remedy
    (run / "last.safetensors").unlink()
    with pytest.raises(UserError, match="a run that has not trained yet"):
        detrellis.load(run)
    (run / "last.state.pt").unlink()
    with pytest.raises(UserError, match="no weights in this folder"):
        detrellis.evaluate(run)


@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_files_of_others(tmp_path: Path, suffix: str) -> None:
    """A whole module, a plain pickle, nothing: never torch's advice to load it all the same."""
    path = tmp_path / f"model.{suffix}"
    for content, words in (
        (Anything(), "holds Python objects besides tensors"),
        ({"lr": 0.1}, "holds no tensors"),
        ([1], "not a state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=words) as error:
            detrellis.load(path)
        assert str(path) in error.value.message
        assert "weights_only" not in str(error.value)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(UserError, match=r"not a whole file of torch\.save"):
        detrellis.load(path)
