"""A search over a recipe's fields: what it may draw, what it goes on with, and what it stops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from detrellis.data.shapes import write_shapes
from detrellis.errors import UserError
from detrellis.recipes import find_recipe
from detrellis.study import launch, run
from detrellis.study.plan import DONE, TrialOutcome
from detrellis.study.run import Conditions
from detrellis.study.space import Dimension, chosen, parse_dimension, parse_space
from detrellis.study.tune import RESULT, Search, Tuner, best_of, options

from ..test_cli import call
from .trials import DATA, epoch_record, finish

pytest.importorskip("optuna")
TINY = find_recipe("tiny").override("schedule.epochs=4")
SPACE = ["optim.lr=1e-4..1e-2:log", "detector.decoder.layers=2..6", "schemes=cdn,align=2+cdn"]
STUB = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
(folder / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": 1, "eval": {"AP": 0.1}}\\n')
(folder / "done.json").write_text("{}")
"""


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a network can be built is another test's."""
    monkeypatch.setattr("detrellis.study.tune.check_row", lambda recipe, classes: None)


def search(trials: int = 6, **changes: Any) -> Search:
    return Search(TINY, parse_space(SPACE, TINY), Conditions(DATA), trials, **changes)


def drawn(tuner: Tuner) -> list[dict[str, Any]]:
    return [candidate.drawn for candidate in tuner.candidates]


def play(search: Search, out: Path) -> Tuner:
    """The whole search with runs whose AP depends on the rate of learning alone: 2e-3 is best."""
    tuner = Tuner(search, out)
    while (outcome := tuner.next()) is not None:
        assert outcome.trial.recipe.optim.lr > 0
        finish(outcome.folder, [0, 50 - 10 * abs(math.log(outcome.trial.recipe.optim.lr / 2e-3))])
        outcome.state = "finished"
        tuner.ended(outcome)
    return tuner


def test_ranges_and_choices() -> None:
    assert parse_dimension("optim.lr=1e-4..1e-2:log") == Dimension(
        "optim.lr", "optim.lr=1e-4..1e-2:log", 1e-4, 1e-2, True
    )
    assert parse_dimension("a=2..6").whole
    assert parse_dimension("a=null, 0.5,[1, 2]").choices == ("null", "0.5", "[1, 2]")
    assert parse_dimension("schemes=none,align=2+group=3").choices == ("none", "align=2+group=3")


@pytest.mark.parametrize(
    "text",
    [
        "optim.lr",
        "optim.lr=",
        "optim.lr=3",
        "optim.lr=2..1",
        "optim.lr=a..b",
        "optim.lr=0..1:log",
        "schemes=align",
        "a=1,1",
    ],
)
def test_what_is_no_search_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--search"):
        parse_dimension(text)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "nothing to search"),
        (["optim.lr=1e-4..1e-3", "optim.lr=1..2"], "stands twice"),
        (["optim.lrr=1e-4..1e-3"], r"optim\.lr"),
        (["optim.lr=1e-4..1e9"], r"optim\.lr"),
        (["detector.decoder.layers=2..2.5"], "layers"),
        (["schemes=none,alig"], "align"),
    ],
)
def test_what_the_recipe_refuses_is_refused_before_anything_runs(
    texts: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        parse_space(texts, TINY)


def test_a_schemes_dial_counts_with_the_scheme_only() -> None:
    space = parse_space(["schemes=none,align=2", "schemes.align.tau=1..2"], TINY)
    values = {"schemes": "none", "schemes.align.tau": 1.7}
    assert chosen(TINY, space, values).schemes.align is None
    dialled = chosen(TINY, space, values | {"schemes": "align=2"}).schemes.align
    assert dialled is not None
    assert dialled.tau == 1.7


@pytest.mark.usefixtures("light")
def test_it_finds_what_is_better_and_says_how_to_train_it(tmp_path: Path) -> None:
    tuner = play(search(22), tmp_path / "out")
    assert drawn(tuner)[0] == {}
    best = best_of(tuner)
    assert best is not None
    assert 1e-3 < best.values["optim.lr"] < 4e-3
    random = [c.ap or 0.0 for c in tuner.candidates[1:9]]
    later = [c.ap or 0.0 for c in tuner.candidates[-8:]]
    assert sum(later) > sum(random), "it learns from what it has tried"
    assert max(tuner.importances(), key=tuner.importances().__getitem__) == "optim.lr"
    words = options(tuner.search, best)
    schemes, overrides = words[1], words[3::2]
    again = TINY.with_schemes(schemes).override(overrides)
    assert best.outcome is not None
    assert again == best.outcome.trial.recipe
    stored = json.loads((tmp_path / "out" / RESULT).read_text())["trials"]
    assert [trial["AP"] for trial in stored] == [c.ap for c in tuner.candidates]


@pytest.mark.usefixtures("light")
def test_a_search_that_goes_on_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    whole = drawn(play(search(11), tmp_path / "whole"))
    part = drawn(play(search(10), tmp_path / "part"))
    assert part == whole[:10]
    assert drawn(play(search(11), tmp_path / "part")) == whole
    assert drawn(play(search(11, seed=1), tmp_path / "other")) != whole
    with pytest.raises(UserError, match="another search: seed 0, now 1"):
        play(search(11, seed=1), tmp_path / "part")


@pytest.mark.usefixtures("light")
def test_a_stopped_trial_goes_on_first(tmp_path: Path) -> None:
    tuner, outcomes = Tuner(search(3), tmp_path), []
    for _ in range(2):
        outcome = tuner.next()
        assert outcome is not None
        outcome.state = "running"
        outcomes.append(outcome)
    finish(outcomes[0].folder, [10.0])
    outcomes[0].state = "finished"
    tuner.ended(outcomes[0])
    again = Tuner(search(3), tmp_path)
    assert [again.candidates[0].state, again.candidates[0].ap] == ["finished", 10.0]
    first = again.next()
    assert first is not None
    assert first.trial == outcomes[1].trial


@pytest.mark.usefixtures("light")
def test_below_the_median_of_the_others_is_hopeless(tmp_path: Path) -> None:
    tuner = Tuner(search(9), tmp_path)

    def started(curve: list[float], done: bool) -> TrialOutcome:
        outcome = tuner.next()
        assert outcome is not None
        outcome.folder.mkdir(parents=True)
        records = [epoch_record(epoch, ap, 1.0) for epoch, ap in enumerate(curve, 1)]
        (outcome.folder / "metrics.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in records)
        )
        outcome.state = "running"
        tuner.hopeless(outcome)
        if done:
            (outcome.folder / DONE).write_text("{}")
            outcome.state = "finished"
            tuner.ended(outcome)
        return outcome

    for base in (20.0, 10.0, 20.0, 30.0, 40.0):
        started([base, base + 1, base + 2, base + 3], done=True)
    assert tuner.hopeless(started([1.0], done=False)) is False, "too early to say"
    outcome = started([1.0, 2.0], done=False)
    assert tuner._asked[tuner.candidates[-1].number].should_prune()
    outcome.state = "pruned"
    tuner.ended(outcome)
    assert not tuner._asked[tuner.candidates[-2].number].should_prune()
    well = started([50.0, 51.0], done=False)
    assert not tuner.hopeless(well)


def test_the_command_line_searches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CHILD", ("-I", "-S", "-c", STUB))
    monkeypatch.setattr(run, "POLL_SECONDS", 0.02)
    monkeypatch.setattr("detrellis.study.rows.count_classes", lambda source, skip_bad: 3)
    data = write_shapes(tmp_path / "data", train=4, val=2, size=(32, 32))
    out = tmp_path / "out"
    words = ["tune", "tiny", "--data", data, "--out", out, "--trials", 3]
    words += ["--search", "optim.lr=1e-4..1e-3:log"]
    shown = call(*words, capsys=capsys)
    assert "3/3  trial-002, seed 0: started" in shown
    assert "1/3  as it is, seed 0: started" in shown, "of how many, not of how many so far"
    assert "Next: detrellis train tiny" in shown or "Nothing that was tried" in shown
    assert "have not ended" not in shown
    records = json.loads(call(*words, "--json", capsys=capsys))
    assert [record["state"] for record in records] == ["finished"] * 3
    assert "another search" in call(*words, "--seed", 5, capsys=capsys, code=2)
    monkeypatch.setattr(launch, "CHILD", ("-I", "-S", "-c", STUB.replace("0.1", "0.01")))
    elsewhere = [tmp_path / "poor" if word == out else word for word in words]
    assert "No trial has learned more than AP 1.0" in call(*elsewhere, capsys=capsys)
    monkeypatch.setattr(launch, "CHILD", ("-I", "-S", "-c", "import sys; sys.exit(143)"))
    stopped = call(*words, "--trials", 5, capsys=capsys, code=1)
    assert "Trials that have not ended: 2. The same command goes on." in stopped
