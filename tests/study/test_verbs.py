"""`detrellis compare` and `detrellis reproduce` as a user meets them,
with runs that are made up.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from detrellis.cli import main
from detrellis.study import launch, pace, run

ROWS = ("--schemes", "none,align")
# In place of a training: AP 10 for one without schemes, 12 with; a recipe of 7 epochs fails.
STUB = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
order = json.loads((folder / "trial.json").read_text())
epochs = order["recipe"]["schedule"]["epochs"]
if epochs == 7:
    sys.exit("loss is not finite")
ap = 0.12 if any(order["recipe"]["schemes"].values()) else 0.1
stats = {"AP": ap, "AP50": ap, "AP75": ap}
record = {"kind": "epoch", "epoch": epochs, "step": 10 * epochs, "images_per_second": 8.0, "eval": stats}
(folder / "metrics.jsonl").write_text(json.dumps(record) + "\\n")
(folder / "done.json").write_text(json.dumps({"device": "cpu", "threads": 1, "jobs": 1}))
"""


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHILD", ("-c", STUB))
    monkeypatch.setattr(run, "POLL_SECONDS", 0.02)


def call(
    *arguments: object,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int = 0,
) -> str:
    """Its standard output, in one line; of an error the message."""
    monkeypatch.setattr(sys, "argv", ["detrellis", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == code, out + err
    return " ".join((err if code == 2 else out).split())


def test_compare(
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    arguments = ("compare", "--data", shapes, *ROWS, "--epochs", 2, "--jobs", 2, "--out", out)
    text = call(*arguments, "--seeds", 1, capsys=capsys, monkeypatch=monkeypatch)
    for wanted in (
        "10.0",
        "+2.0",
        "In the one seed that ran, the best is align",
        "One seed:",
        "report.html",
    ):
        assert wanted in text
    found = json.loads(
        call(*arguments, "--seeds", 2, "--json", capsys=capsys, monkeypatch=monkeypatch)
    )
    assert found["rows"][1]["gain"]["mean"] == pytest.approx(2)
    assert found["study"]["command"].startswith(
        f"detrellis compare --data {shapes} --schemes none,align"
    )
    assert found["study"]["seeds"] == [0, 1]
    longer = [
        3 if argument == 2 and arguments[i - 1] == "--epochs" else argument
        for i, argument in enumerate(arguments)
    ]
    text = call(*longer, "--seeds", 2, capsys=capsys, monkeypatch=monkeypatch, code=2)
    assert "another study in this folder: row none: schedule.epochs 2, now 3" in text


def test_compare_at_equal_time(
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        pace, "training_step", lambda recipe, *_: 1.0 if recipe.schemes.align is None else 2.0
    )
    monkeypatch.setattr(pace, "seconds_of", lambda step, device: step)
    arguments = ("compare", "--data", shapes, *ROWS, "--epochs", 4, "--seeds", 1, "--device", "cpu")
    arguments += ("--out", tmp_path / "out")
    text = call(*arguments, "--equal", "time", capsys=capsys, monkeypatch=monkeypatch)
    assert "Timing steps of align, to give" in text
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["pace"] == {"align": 2.0}
    assert [row["recipe"]["schedule"]["epochs"] for row in plan["rows"]] == [4, 2]
    text = call(*arguments, capsys=capsys, monkeypatch=monkeypatch, code=2)
    assert "equal time, now equal epochs" in text


def test_failed_runs_are_told_with_their_log(
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("compare", "--data", shapes, *ROWS, "--epochs", 7, "--seeds", 1)
    text = call(
        *arguments, "--out", tmp_path / "out", capsys=capsys, monkeypatch=monkeypatch, code=1
    )
    assert "Nothing to compare yet" in text
    assert "align, seed 0 failed: loss is not finite exit code 1" in text


def test_reproduce_lists_what_was_published(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = call("reproduce", capsys=capsys, monkeypatch=monkeypatch)
    assert all(paper in text for paper in ("align", "co", "group", "sam"))
    assert "What each part adds" in call(
        "reproduce", "align", capsys=capsys, monkeypatch=monkeypatch
    )
    text = call(
        "reproduce", "align", "1", "--data", ".", "--list", capsys=capsys, monkeypatch=monkeypatch
    )
    assert all(word in text for word in ("50.5", "+1.5", "needs AdaMixer", "baseline"))
    found = json.loads(
        call("reproduce", "align", "1", "--json", capsys=capsys, monkeypatch=monkeypatch)
    )
    assert found["rows"][0]["published"]["AP"] == 43.7
    for wrong, message in (
        (("alig",), "Did you mean align"),
        (("align", "12"), "paper align, table"),
    ):
        assert message in call("reproduce", *wrong, capsys=capsys, monkeypatch=monkeypatch, code=2)


def test_reproduce_runs_rows_beside_the_published_figures(
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("reproduce", "align", "4", "--data", shapes, "--scale", "tiny", "--epochs", 1)
    found = json.loads(
        call(*arguments, "--row", "all", "--json", capsys=capsys, monkeypatch=monkeypatch)
    )
    row, base = found["rows"]  # as the table has them
    assert (base["against"], row["against"]) == (None, base["name"])
    assert row["published_gain"] == pytest.approx(row["published"] - base["published"])
    assert "published difference" in found["recommendation"]
    assert (tmp_path / "reproduce" / "align-4" / "report.html").exists()
