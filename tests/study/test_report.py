"""The report's arithmetic on runs that are made up, its words, and its page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from detrellis.study.conduct import save, to_dict
from detrellis.study.page import page
from detrellis.study.report import StudyReport, read_report
from detrellis.study.results import estimate, read_trial
from detrellis.study.tables import report_tables
from detrellis.study.words import caveats, recommend

from .trials import STEPS, finish, make_plan, outcomes


def study(
    out: Path,
    curves: dict[str, list[list[float | None]]],
    rates: dict[str, float],
    **published: float,
) -> StudyReport:
    """Rows with a curve for each seed, and the images a second at which they trained."""
    epochs = len(next(iter(curves.values()))[0])
    seeds = range(max(len(of) for of in curves.values()))
    plan = make_plan({name: published.get(name) for name in curves}, seeds=seeds, epochs=epochs)
    for trial in plan.trials():
        if trial.seed < len(curves[trial.row]):
            finish(trial.folder(out), curves[trial.row][trial.seed], rates[trial.row])
    return read_report(plan, outcomes(plan, out))


def test_estimate() -> None:
    one = estimate([2.0])
    assert (one.mean, one.spread, one.interval, one.sign) == (2.0, None, None, 0)
    three = estimate([1.0, 2.0, 3.0])
    assert (three.mean, three.spread) == (2.0, 1.0)
    # t(2, 0.975) as tables have it
    assert three.interval == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert three.sign == 0
    assert estimate([1.9, 2.0, 2.1]).sign == 1
    assert estimate([-1.9, -2.0, -2.1]).sign == -1
    assert estimate([2.0, 2.0]).interval == 0


def test_a_trials_numbers(tmp_path: Path) -> None:
    finish(tmp_path / "run", [None, 10.0, 30.0, 20.0], rate=16.0)
    found = read_trial(tmp_path / "run", 5, batch_size=8)
    assert found is not None
    assert (found.seed, found.epochs, found.ap) == (5, (2, 3, 4), pytest.approx((10, 30, 20)))
    assert (found.final, found.best, found.ap50, found.ap75) == pytest.approx((20, 30, 40, 10))
    assert (found.step_seconds, found.epoch_seconds) == (0.5, 0.5 * STEPS)
    finish(tmp_path / "blind", [None, None])
    assert read_trial(tmp_path / "blind", 0, batch_size=8) is None


def test_a_row_of_a_branch_has_the_branchs_numbers(tmp_path: Path) -> None:
    finish(tmp_path / "run", [10, 20, 30], branch={"AP": 0.25, "AP50": 0.5, "AP75": None})
    found = read_trial(tmp_path / "run", 0, 8)
    assert found is not None
    assert (found.epochs, found.ap, found.ap50) == ((3,), (25.0,), 50.0)
    assert "branch" not in found.machine
    finish(tmp_path / "none", [10], branch={"AP": None, "AP50": None, "AP75": None})
    assert read_trial(tmp_path / "none", 0, 8) is None


def test_one_slow_epoch_does_not_change_the_step_time(tmp_path: Path) -> None:
    finish(tmp_path / "run", [1.0, 2.0, 3.0], rate=16.0)
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[1].replace("16.0", "0.1"), *lines[2:]]) + "\n")
    found = read_trial(tmp_path / "run", 0, batch_size=8)
    assert found is not None
    assert found.step_seconds == 0.5


def test_gains_are_paired_by_seed(tmp_path: Path) -> None:
    """The seeds differ much, the gain hardly: pairing sees it."""
    curves = {"none": [[10, 20], [10, 30], [10, 40]], "align": [[10, 22.0], [30, 32.0], [10, 42.3]]}
    found = study(tmp_path, curves, {"none": 16, "align": 8})
    base, line = found.rows
    assert base.gain is None
    assert (base.final.mean, base.final.spread) == pytest.approx((30, 10))
    assert line.gain is not None
    assert line.gain.mean == pytest.approx(2.1)
    assert line.gain.interval == pytest.approx(
        4.302652729911275 * 0.1 * math.sqrt(3) / math.sqrt(3)
    )
    assert line.gain.sign == 1
    assert line.best.mean == pytest.approx(32.1)
    assert [round(ap, 6) for _, ap in line.curve] == [round(50 / 3, 6), 32.1]
    assert line.cost == pytest.approx(2)


def test_gains_hold_the_noise_of_the_images(tmp_path: Path) -> None:
    """The draws of a row and its baseline are of the same images:
    what both gain by a draw cancels.
    """
    plan = make_plan({"none": None, "align": None}, seeds=(0, 1), epochs=1)
    draws = {"none": ([0.10, 0.30], [0.10, 0.30]), "align": ([0.13, 0.31], [0.13, 0.33])}
    for trial in plan.trials():
        ap, drawn = (20 if trial.row == "none" else 22 + trial.seed), draws[trial.row][trial.seed]
        finish(trial.folder(tmp_path), [ap], resampled={"eval": drawn, "after_nms": [None, 0.5]})
    found = read_report(plan, outcomes(plan, tmp_path))
    gain = found.rows[1].gain
    assert gain is not None
    assert gain.interval is not None
    # Mean over the seeds of the two draws' gains: 3 and 2 AP
    over_images = 1.959964 * (3 - 2) / math.sqrt(2)
    assert gain.with_images == pytest.approx(math.hypot(gain.interval, over_images))
    table = report_tables(found)[0]
    assert table.rows[1][table.columns.index("other images, too")] == "[-4.0, +9.0]"
    assert "resampled" not in json.dumps(to_dict(found))


def test_a_seed_that_failed_is_left_out_of_the_pairs(tmp_path: Path) -> None:
    curves = {"none": [[20], [30], [90]], "align": [[21], [32]]}
    found = study(tmp_path, curves, {"none": 16, "align": 16})
    gain = found.rows[1].gain
    assert gain is not None
    assert (gain.mean, gain.seeds) == (pytest.approx(1.5), 2)
    assert "seeds" in report_tables(found)[0].columns
    assert any("align, seed 2 (stopped)" in text for text in caveats(found))


def test_epochs_to_the_baseline_and_ap_in_the_same_time(tmp_path: Path) -> None:
    curves = {
        "none": [[1, 10, 20, 25, 24]],
        "fast": [[10, 24, 25, 26, 30]],
        "slow": [[1, 2, 3, 4, 5]],
    }
    found = study(tmp_path, curves, {"none": 16, "fast": 12, "slow": 2})
    base, fast, slow = found.rows
    assert (base.epochs_to_baseline, fast.epochs_to_baseline, slow.epochs_to_baseline) == (
        4,
        2,
        None,
    )
    # None ends first, after 5 epochs of 5 s; by then `fast` has done 3 of 6.67 s, and `slow` none
    # of 40 s.
    assert {line.budget for line in found.rows} == {25.0}
    assert base.timely == (5, pytest.approx(24))
    assert fast.timely == (3, pytest.approx(25))
    assert slow.timely is None
    cost = {row[0]: row[1:] for row in report_tables(found)[1].rows}
    assert cost["slow"] == ("4 s", "8.00", "1.0 GiB", "> 5", "-")


def test_rows_of_equal_time_have_no_ap_in_the_same_time(tmp_path: Path) -> None:
    found = study(tmp_path, {"none": [[1, 10]], "slow": [[1, 2]]}, {"none": 16, "slow": 2})
    alike = read_report(replace(found.plan, pace={"slow": 8.0}), outcomes(found.plan, tmp_path))
    assert [line.timely for line in alike.rows] == [None, None]
    columns = report_tables(alike)[1].columns
    assert "epochs" in columns
    assert "AP in the same time" not in columns
    assert "AP in the same time" in report_tables(found)[1].columns
    assert any(
        "for the same time" in text and "none 2, slow 2 epochs" in text for text in caveats(alike)
    )
    assert not any("for the same time" in text for text in caveats(found))
    assert "by the paces in plan.json" in page(alike, {}, tmp_path)


def test_rows_with_baselines_of_their_own(tmp_path: Path) -> None:
    plan = make_plan({"a": 30.0, "a+": 33.0, "b": 40.0, "b+": None}, seeds=(0,), epochs=1)
    rows = [
        replace(row, against=against)
        for row, against in zip(plan.rows, (None, "a", None, "b"), strict=True)
    ]
    plan = replace(plan, rows=tuple(rows))
    for trial, ap, rate in zip(plan.trials(), (10.0, 12.0, 20.0, 15.0), (16, 8, 4, 4), strict=True):
        finish(trial.folder(tmp_path), [ap], rate)
    found = read_report(plan, outcomes(plan, tmp_path))
    assert plan.baseline is None
    assert [line.gain and line.gain.mean for line in found.rows] == [
        None,
        pytest.approx(2),
        None,
        pytest.approx(-5),
    ]
    assert [line.published_gain for line in found.rows] == [None, 3.0, None, None]
    assert [line.cost for line in found.rows] == [1, 2, 1, 1]
    assert [line.budget for line in found.rows] == [5, 5, 20, 20]
    assert recommend(found).startswith(
        "Of 1 published differences, 1 have the same sign here. One seed"
    )
    assert {"baseline", "published AP", "published gain"} <= set(report_tables(found)[0].columns)
    assert any("signs and order" in text for text in caveats(found))


def test_published_differences_that_are_found_again(tmp_path: Path) -> None:
    curves = {
        "none": [[20.0], [30.0]],
        "up": [[22.0], [32.0]],
        "down": [[19.0], [29.0]],
        "same": [[20.1], [29.8]],
    }
    rates = dict.fromkeys(curves, 16.0)
    found = study(tmp_path, curves, rates, none=40.0, up=41.0, down=42.0, same=39.0)
    assert recommend(found) == (
        "Of 3 published differences, 2 have the same sign here, 1 of them beyond the spread "
        "over the seeds; 1 have the other sign beyond it."
    )


def test_recommendation_names_gain_interval_cost_and_what_is_unclear(tmp_path: Path) -> None:
    up = [[10, 23.0], [10, 33.1], [10, 42.9]]
    curves = {"none": [[5, 20], [5, 30], [5, 40]], "up": up, "noise": [[0, 25], [0, 30], [0, 38]]}
    curves["down"] = [[0, 18], [0, 28.1], [0, 37.9]]
    found = study(tmp_path, curves, {"none": 16, "up": 8, "noise": 16, "down": 16})
    text = recommend(found)
    assert text.startswith(
        "up: +3.0 AP (± 0.2, 95 % interval over 3 seeds) at 2.00 times the step time of none."
    )
    assert "After the same training time (10 s) it is -20.0 AP." in text
    assert "Not told apart from none: noise (+1.0 ± 9.0)." in text
    assert "Below none: down (-2.0 ± 0.2)." in text


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        (
            {"none": [[20], [30]], "up": [[21], [35]]},
            "No row is above none by more than the spread over the seeds; the best",
        ),
        (
            {"none": [[20]], "up": [[23]]},
            "In the one seed that ran, the best is up, +3.0 AP against none at 1.00 times",
        ),
        ({"none": [[20]], "up": [[17]]}, "no row is above none; the nearest is up, -3.0 AP"),
        ({"none": [[0.0]], "up": [[0.03]]}, "no row is above none; the nearest is up, +0.0 AP"),
        ({"none": [], "up": [[17]]}, "Nothing to compare yet: none and another"),
    ],
)
def test_no_recommendation_without_evidence(
    tmp_path: Path, curves: dict[str, list[list[float]]], message: str
) -> None:
    curves = dict(sorted(curves.items(), key=lambda item: item[0] != "none"))
    plan = make_plan(dict.fromkeys(curves), seeds=range(max(map(len, curves.values()))), epochs=1)
    for trial in plan.trials():
        if trial.seed < len(curves[trial.row]):
            finish(trial.folder(tmp_path), curves[trial.row][trial.seed])
    assert message in recommend(read_report(plan, outcomes(plan, tmp_path)))


def test_caveats_say_what_the_figures_do_not_show(tmp_path: Path) -> None:
    found = study(tmp_path, {"none": [[0.1, 0.2]], "align": [[0.1, 1.0]]}, {"none": 16, "align": 8})
    text = " ".join(caveats(found))
    assert "One seed:" in text
    assert "none ends at AP 0.2: it has hardly learned" in text
    assert "lower bound" in text
    curve = [10.0, 20.0, 30.0, 40.0, 50.0]
    found = study(
        tmp_path / "two",
        {"none": [curve, curve], "align": [curve, curve]},
        {"none": 16, "align": 16},
    )
    text = " ".join(caveats(found))
    assert "Two seeds:" in text
    assert "still gains 10.0 AP after epoch 4 of 5:" in text
    assert "lower bound" not in text


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [(20.0, 26.0, "still gains 6.0 AP after epoch 5 of 10:"), (20.0, 22.0, None)],
)
def test_what_a_seldom_evaluated_run_still_gains(
    tmp_path: Path, first: float, last: float, told: str | None
) -> None:
    curve = [None, None, None, None, first, None, None, None, None, last]
    rows = {"none": [curve, curve], "align": [curve, curve]}
    text = " ".join(caveats(study(tmp_path, rows, {"none": 16, "align": 16})))
    assert told in text if told else "still gains" not in text


def test_what_duplicates_cost(tmp_path: Path) -> None:
    plan = make_plan({"none": None, "align": None, "old": None}, seeds=(0, 1), epochs=1)
    after = {("none", 0): 30.0, ("none", 1): 34.0, ("align", 0): 35.0, ("align", 1): 37.0}
    for trial in plan.trials():
        ap = after.get((trial.row, trial.seed))
        apart = None if ap is None else {"AP": ap / 100, "AP50": 0.6, "AP75": 0.2}
        finish(trial.folder(tmp_path), [28.0 if trial.row == "none" else 36.0], after_nms=apart)
    found = read_report(plan, outcomes(plan, tmp_path))
    none, align, old = found.rows
    assert none.after_nms is not None
    assert [e.mean for e in none.after_nms] == pytest.approx([32, 60, 20])
    assert (none.duplicates, align.duplicates, old.duplicates) == (
        pytest.approx(4),
        pytest.approx(0),
        None,
    )
    assert align.gain_after_nms is not None
    assert align.gain_after_nms.mean == pytest.approx(4)  # +5 and +3
    assert (none.gain_after_nms, old.gain_after_nms, old.after_nms) == (None, None, None)
    sheet = report_tables(found)[1]
    assert sheet.columns == ("row", "AP", "gain over none", "AP50", "AP75", "NMS adds")
    assert [row[-1] for row in sheet.rows] == ["+4.0", "+0.0", "-"]
    assert any(
        "more than once: NMS at IoU 0.7 adds AP (none +4.0)." in text for text in caveats(found)
    )
    told = json.loads(json.dumps(to_dict(found)))["rows"]
    assert told[1]["gain_after_nms"]["mean"] == pytest.approx(4)
    assert told[0]["after_nms"]["AP50"]["mean"] == pytest.approx(60)
    assert told[2]["after_nms"] is None


def test_times_are_of_one_setting(tmp_path: Path) -> None:
    plan = make_plan({"none": None, "align": None}, seeds=(0, 1), epochs=1)
    for trial in plan.trials():
        elsewhere = (trial.row, trial.seed) == ("align", 1)
        rate = 1.0 if elsewhere else {"none": 16, "align": 8}[trial.row]
        finish(trial.folder(tmp_path), [10.0], rate=rate, jobs=2 if elsewhere else 1)
    found = read_report(plan, outcomes(plan, tmp_path))
    align = found.row("align")
    assert align is not None
    assert align.cost == pytest.approx(2.0)
    assert [run.final for run in align.runs] == [10.0, 10.0]
    told = " ".join(caveats(found))
    assert (
        "Times and memory are of the 3 runs on cpu, CPU threads 1; the other 1 had another machine"
    ) in told
    assert "at a time slowed" not in told


class Page(HTMLParser):
    """Collects what a page refers to, and sees that its elements are closed."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    curves = {"none": [[10, 20], [12, 22]], "<b>align</b>": [[10, 25], [11, 26]]}
    found = study(tmp_path, curves, {"none": 16, "<b>align</b>": 8})
    failed = replace(found, plan=replace(found.plan, skipped={"x": "needs <y>"}))
    save(failed, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.tags.count("svg") == 2
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert "http" not in text
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text)
    assert "<b>" not in text
    assert "&lt;b&gt;align&lt;/b&gt;" in text
    for wanted in (
        "detrellis compare",
        "/data/train.json",
        "prefers-color-scheme: dark",
        'name="viewport"',
        "needs &lt;y",
    ):
        assert wanted in text
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_what_is_saved(tmp_path: Path) -> None:
    found = study(tmp_path, {"none": [[10, 20]], "align": [[10, 25]]}, {"none": 16, "align": 8})
    (found.plan.trials()[1].folder(tmp_path) / "report.html").write_text("")
    save(found, tmp_path)
    assert re.findall(r'href="([^"#]+)"', (tmp_path / "report.html").read_text()) == [
        "align/seed-0/report.html"
    ]
    told = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in told["rows"]] == ["none", "align"]
    unknown = dict.fromkeys(("spread", "interval", "with_images"))
    assert told["rows"][1]["gain"] == {"mean": pytest.approx(5), "seeds": 1} | unknown
    assert told["rows"][1]["runs"][0]["machine"]["device"] == "cpu"
    assert told["recommendation"] == recommend(found)
    for name in ("curves", "gains"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > picture.height


def test_nothing_finished_is_a_report_too(tmp_path: Path) -> None:
    plan = make_plan({"none": None, "align": None})
    found = read_report(plan, outcomes(plan, tmp_path))
    save(found, tmp_path)
    assert "Nothing to compare yet" in (tmp_path / "report.html").read_text()
