from __future__ import annotations

import errno
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from detrellis.engine import log
from detrellis.engine.console import TrainingView, _Eta, main_terms, time_line
from detrellis.engine.log import RunLog, Timer, read_records
from detrellis.engine.means import Means


@pytest.fixture(autouse=True)
def _frequent_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "RECORD_EVERY", 5)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A run of `epochs` epochs of 10 steps; the loss of step s is 100 - s, in two terms."""

    def __init__(
        self, folder: Path, *, step: int = 0, terminal: bool = False, **options: Any
    ) -> None:
        self.text, self.clock, self.done = io.StringIO(), Clock(), step
        console = Console(file=self.text, force_terminal=terminal, width=120)
        options = {"epochs": 3, "steps_per_epoch": 10} | options
        self.log = RunLog(folder, step=step, console=console, clock=self.clock, **options)

    def steps(self, count: int, seconds: float = 1.0) -> None:
        for _ in range(count):
            self.clock.now += seconds
            self.done += 1
            losses = {
                "main/class/0": torch.tensor(1.0),
                "main/class/1": torch.tensor(float(self.done)),
                "dn/class/1": 2.0,
            }
            iou = torch.tensor(math.nan if self.done % 2 else self.done / 100)
            self.log.step(
                self.done,
                losses,
                {"main/iou": iou},
                total=torch.tensor(100.0 - self.done),
                lr=1e-4,
                images=4,
            )

    def epoch(self, number: int, seconds: float = 1.0, **end: Any) -> None:
        self.log.start_epoch(number)
        self.steps(10, seconds)
        self.log.end_epoch(**end)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_step_records_hold_means_since_the_last_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.epoch(1)
    steps = [r for r in records(tmp_path) if r["kind"] == "step"]
    assert [r["step"] for r in steps] == [1, 5, 10]
    assert [r["loss"] for r in steps] == pytest.approx([99, 100 - 3.5, 92])
    assert steps[1]["losses"] == pytest.approx(
        {"main/class/0": 1, "main/class/1": 3.5, "dn/class/1": 2}
    )
    assert steps[0]["metrics"] == {"main/iou": None}  # nothing measured
    assert steps[1]["metrics"]["main/iou"] == pytest.approx(0.03)  # steps 2 and 4
    assert steps[2]["metrics"]["main/iou"] == pytest.approx(0.08)  # 6, 8 and 10
    assert [r["images_per_second"] for r in steps] == pytest.approx([4, 4, 4])
    assert all(r["lr"] == 1e-4 and r["epoch"] == 1 for r in steps)


def test_epoch_records_hold_means_of_all_steps_and_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "RECORD_EVERY", 4)
    run = Run(tmp_path)  # the last record of the epoch comes before its end
    run.log.start_epoch(1)
    run.steps(10)
    run.clock.now += 5  # the evaluation is not training time
    run.log.end_epoch({"forward": 7.0, "eval": 5.0}, {"AP": 0.25, "AP50": None})
    epoch = records(tmp_path)[-1]
    assert (epoch["kind"], epoch["epoch"], epoch["step"]) == ("epoch", 1, 10)
    assert epoch["loss"] == pytest.approx(94.5)
    assert epoch["losses"]["main/class/1"] == pytest.approx(5.5)
    assert epoch["metrics"]["main/iou"] == pytest.approx(0.06)
    assert epoch["images_per_second"] == pytest.approx(4)
    assert epoch["seconds"] == {"total": 15.0, "forward": 7.0, "eval": 5.0}
    assert epoch["eval"] == {"AP": 0.25, "AP50": None}
    run.epoch(2)
    assert records(tmp_path)[-1]["loss"] == pytest.approx(84.5)  # of epoch 2 alone
    assert {r["images_per_second"] for r in records(tmp_path)} == {4.0}


def test_records_are_on_disk_at_once_and_strict_json(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log.start_epoch(1)
    run.log.step(
        1, {"a": torch.tensor(math.inf)}, {}, total=torch.tensor(math.nan), lr=0.1, images=1
    )
    (record,) = records(tmp_path)
    assert record["loss"] is None
    assert record["losses"] == {"a": None}


@pytest.mark.parametrize("torn", ["", '{"kind": "step", "ep', '{"kind": "step", "ep\n'])
def test_resuming_removes_what_is_done_again(tmp_path: Path, torn: str) -> None:
    run = Run(tmp_path)
    run.epoch(1)
    run.log.start_epoch(2)
    run.steps(7)  # records up to step 15
    run.log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)  # the process died while it wrote
    before = read_records(tmp_path / "metrics.jsonl")
    assert len(before) == 5
    again = Run(tmp_path, step=12)
    assert read_records(tmp_path / "metrics.jsonl") == [r for r in before if r["step"] <= 12]
    again.log.start_epoch(2)
    again.steps(8)
    again.log.end_epoch()
    again.log.close()
    assert read_records(tmp_path / "metrics.jsonl") == records(tmp_path)
    keys = [(r["kind"], r["step"]) for r in records(tmp_path)]
    assert keys == [
        ("step", 1),
        ("step", 5),
        ("step", 10),
        ("epoch", 10),
        ("step", 15),
        ("step", 20),
        ("epoch", 20),
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_resuming_right_after_a_record_keeps_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.epoch(1)
    run.epoch(2)
    Run(tmp_path, step=10)
    assert [(r["kind"], r["step"]) for r in records(tmp_path)] == [
        ("step", 1),
        ("step", 5),
        ("step", 10),
        ("epoch", 10),
    ]


def test_an_epoch_whose_evaluation_is_done_again_is_there_once(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first.epoch(1, stats={"AP": 0.1})
    first.log.close()
    again = Run(tmp_path, step=10)
    again.log.start_epoch(1)
    again.log.end_epoch(stats={"AP": 0.2})
    again.epoch(2, stats={"AP": 0.3})
    epochs = [r for r in records(tmp_path) if r["kind"] == "epoch"]
    assert [(r["epoch"], r["eval"]["AP"]) for r in epochs] == [(1, 0.2), (2, 0.3)]


def no_room(file: Any, lines: bytes) -> None:
    """Half of them is written."""
    file._file.write(lines[: len(lines) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def no_file(path: Path, text: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "full", [(log._RecordFile, "_append", no_room), (log, "replace_text", no_file)]
)
@pytest.mark.parametrize("back", ["in the run", "at its end"])
def test_what_found_no_room_is_written_once_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: str, full: tuple[Any, str, Any]
) -> None:
    """And no half line stays, which the next record would follow."""
    first = Run(tmp_path)
    first.epoch(1)
    first.log.close()
    again = Run(tmp_path, step=10)
    with monkeypatch.context() as disk:
        disk.setattr(*full)
        again.log.start_epoch(1)
        again.log.end_epoch(stats={"AP": 0.2})  # in the place of the first one
        again.epoch(2)
        assert all(r["epoch"] == 1 for r in records(tmp_path))
    if back == "in the run":
        again.epoch(3)
    again.log.close()
    found = [(r["kind"], r["step"]) for r in records(tmp_path)]
    steps = [1, 5, 10, 15, 20, 25, 30] if back == "in the run" else [1, 5, 10, 15, 20]
    assert [step for kind, step in found if kind == "step"] == steps
    assert [step for kind, step in found if kind == "epoch"] == [s for s in steps if s % 10 == 0]
    (epoch,) = (r for r in records(tmp_path) if r["kind"] == "epoch" and r["step"] == 10)
    assert epoch["eval"] == {"AP": 0.2}


def test_a_run_ends_well_where_there_is_never_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    monkeypatch.setattr(log._RecordFile, "_append", no_room)
    run.epoch(1)
    run.log.close()
    run.log.close()
    assert records(tmp_path) == []


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    Run(tmp_path).epoch(1)
    Run(tmp_path)
    assert records(tmp_path) == []


def test_other_processes_do_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run(folder, rank=1)
    with run.log:
        run.log.say("hello")
        run.epoch(1)
        assert list(run.log.track([1, 2], "evaluating")) == [1, 2]
    assert run.text.getvalue() == ""
    assert not folder.exists()


def test_without_a_terminal_lines_come_at_most_every_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "RECORD_EVERY", 1)
    run = Run(tmp_path, steps_per_epoch=100, epochs=2)
    run.log.start_epoch(1)
    run.steps(100, seconds=0.5)
    lines = run.text.getvalue().splitlines()
    assert 4 <= len(lines) <= 6
    assert lines[-1].startswith("epoch 1/2  step ")
    assert all("\x1b" not in line and "loss " in line and "img/s" in line for line in lines)


class TestEta:
    def go(self, clock: Clock, eta: _Eta, steps: int, seconds: float) -> None:
        for _ in range(steps):
            clock.now += seconds
            eta.step()

    def test_the_first_step_is_not_typical(self) -> None:
        clock = Clock()
        eta = _Eta(clock, left=30, steps_per_epoch=10)
        assert eta.left() is None
        eta.start_epoch()
        self.go(clock, eta, 1, seconds=60)  # compiling, for one
        assert eta.left() is None
        self.go(clock, eta, 4, seconds=2)
        self.go(clock, eta, 4, seconds=3)
        assert eta.left() == pytest.approx(21 * 2.5)

    def test_what_lies_between_epochs_is_counted(self) -> None:
        clock = Clock()
        eta = _Eta(clock, left=40, steps_per_epoch=10)
        for evaluation in (30, 50):
            eta.start_epoch()
            self.go(clock, eta, 10, seconds=2)
            clock.now += evaluation
        eta.start_epoch()
        assert eta.left() == pytest.approx(20 * 2 + 2 * 40)
        self.go(clock, eta, 5, seconds=2)
        assert eta.left() == pytest.approx(15 * 2 + 2 * 40)
        self.go(clock, eta, 6, seconds=2)
        assert eta.left() == pytest.approx(9 * 2 + 40)

    def test_a_resumed_run_counts_what_is_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(log, "RECORD_EVERY", 1)
        run = Run(tmp_path, step=20)
        run.log.start_epoch(3)
        run.steps(6, seconds=10)
        assert run.text.getvalue().splitlines()[-1].endswith("eta 0:00:40")


def test_the_epoch_table(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.epoch(1, seconds=2)
    run.log.start_epoch(2)
    run.steps(10, seconds=2)
    run.clock.now += 20
    run.log.end_epoch({"data": 1.0, "forward": 15.0, "eval": 20.0}, {"AP": 0.123456, "AP50": 0.3})
    lines = run.text.getvalue().splitlines()
    header = next(line for line in lines if line.split()[:2] == ["epoch", "loss"])
    assert header.split() == ["epoch", "loss", "class", "IoU", "AP", "AP50", "lr", "img/s"]
    rows = [line for line in lines if line.split()[0] in ("1/3", "2/3")]
    assert rows[0].split() == ["1/3", "94.50", "5.500", "0.060", "-", "-", "1.0e-04", "2.0"]
    assert rows[1].split() == ["2/3", "84.50", "15.50", "0.160", "0.123", "0.300", "1.0e-04", "2.0"]
    assert len({len(line) for line in (header, *rows)}) == 1  # aligned
    assert lines[-1].split("  ")[1:] == [
        "time 0:00:40",
        "data 1.0s 2%",
        "forward 15s 38%",
        "eval 20s 50%",
        "other 4.0s 10%",
    ]


def test_a_class_or_message_with_brackets_is_printed_as_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log.say("loaded [red]backbone[/red] from a/very/long/" + "path/" * 40)
    assert run.text.getvalue().count("\n") == 1
    assert "[red]backbone[/red]" in run.text.getvalue()


def test_on_a_terminal_there_is_a_bar_and_it_goes_away(tmp_path: Path) -> None:
    run = Run(tmp_path, terminal=True)
    with run.log:
        run.epoch(1)
        assert list(run.log.track(range(3), "evaluating", 3)) == [0, 1, 2]
        run.log.start_epoch(2)
        run.steps(5)
        assert run.log._view._bar is not None
        (task,) = run.log._view._bar.tasks
        assert run.log._view._bar.live.transient
        assert (task.description, task.completed, task.total) == ("epoch 2/3", 5, 10)
        assert "loss 87.00" in task.fields["info"]  # steps 11 to 15
    assert run.log._view._bar is None
    assert "\x1b[?25h" in run.text.getvalue()  # the cursor is back
    run.log.close()


def test_the_bar_goes_away_when_training_fails(tmp_path: Path) -> None:
    run = Run(tmp_path, terminal=True)

    def fail() -> None:
        run.log.start_epoch(1)
        raise RuntimeError

    with pytest.raises(RuntimeError), run.log:
        fail()
    assert run.log._view._bar is None


def test_main_terms_are_the_last_layers_of_the_main_queries() -> None:
    losses = {f"main/class/{i}": float(i) for i in range(12)} | {
        "main/box/2": 7.0,
        "dn/class/20": 9.0,
        "schemes/idle": 0.0,
    }
    assert main_terms(losses) == {"class": 11.0, "box": 7.0}


def test_means_survive_a_change_of_names_and_never_keep_a_graph() -> None:
    means = Means()
    weight = torch.ones((), requires_grad=True)
    means.add({"a": weight * 1, "b": 5.0}, {})
    means.add({"a": weight * 3}, {"m": torch.tensor(math.nan)})
    means.add({"a": torch.tensor(5.0, dtype=torch.bfloat16)}, {"m": torch.tensor(2.0)})
    assert means._values is not None
    assert not means._values.requires_grad
    losses, metrics = means.take().means()
    assert (losses, metrics) == ({"a": 3.0, "b": 5.0}, {"m": 2.0})
    assert means.take().means() == ({}, {})


def test_a_loss_that_is_not_a_number_shows_in_the_mean() -> None:
    means = Means()
    means.add({"a": torch.tensor(math.nan)}, {})
    means.add({"a": torch.tensor(1.0)}, {})
    assert math.isnan(means.take().means()[0]["a"])


class TestTimer:
    def test_parts_add_up_and_nested_parts_count_once(self) -> None:
        clock = Clock()
        timer = Timer(clock)
        for _ in range(2):
            with timer.part("outer"):
                clock.now += 1
                with timer.part("inner"):
                    clock.now += 10
                clock.now += 2
            clock.now += 100  # nobody's
        assert timer.take() == {"outer": 6.0, "inner": 20.0}
        assert timer.take() == {}

    def test_waiting_for_items_is_a_part(self) -> None:
        clock = Clock()
        timer = Timer(clock)

        def slow() -> Any:
            for i in range(3):
                clock.now += 2
                yield i

        seen = []
        for item in timer.each("data", slow()):
            clock.now += 50
            seen.append(item)
        assert seen == [0, 1, 2]
        assert timer.take() == {"data": 6.0}

    def test_a_part_that_fails_is_closed(self) -> None:
        clock = Clock()
        timer = Timer(clock)

        def fail() -> None:
            with timer.part("a"):
                clock.now += 1
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        clock.now += 10
        with timer.part("b"):
            clock.now += 2
        assert timer.take() == {"a": 1.0, "b": 2.0}


def test_time_line_of_an_epoch_without_parts() -> None:
    assert time_line({"total": 3725.0}) == "  time 1:02:05"
    assert time_line({"total": 0.0}) == "  time 0:00:00"


def test_the_header_comes_back_in_long_runs() -> None:
    text = io.StringIO()
    view = TrainingView(Console(file=text, width=120), Clock(), epochs=50, steps=1)
    record = {
        "epoch": 1,
        "loss": 1.0,
        "losses": {},
        "metrics": {},
        "lr": 0.1,
        "images_per_second": None,
        "eval": None,
    }
    for _ in range(45):
        view.end_epoch(record | {"seconds": {"total": 1.0}})
    assert text.getvalue().count("img/s") == 3
