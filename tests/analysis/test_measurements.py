"""The list of measurements: each is a pair that fits together, and a command."""

from __future__ import annotations

import inspect

import pytest

from detrellis.analysis.measurements import MEASUREMENTS, Measurement, measurement
from detrellis.analysis.runs import ComparedRuns, as_json
from detrellis.cli.analyze import analyze
from detrellis.errors import UserError

from .runs import without_boxes


@pytest.mark.parametrize("one", MEASUREMENTS, ids=lambda m: m.result.name)
def test_what_is_measured_can_be_drawn(one: Measurement) -> None:
    """`analyze` takes runs and gives the result that `draw` takes."""
    taken = inspect.signature(one.analyze)
    drawn = inspect.signature(one.draw)
    assert next(iter(taken.parameters.values())).annotation == "ComparedRuns"
    assert taken.return_annotation == one.result.__name__
    assert [p.annotation for p in drawn.parameters.values()] == [one.result.__name__]
    assert measurement(one.result.name) is one


def test_each_is_a_file_with_a_figure_and_a_command() -> None:
    files = {one.analyze.__module__.rpartition(".")[2] for one in MEASUREMENTS}
    figures = {one.draw.__module__.rpartition(".")[2] for one in MEASUREMENTS}
    commands = {c.name or c.callback.__name__ for c in analyze.registered_commands if c.callback}
    names = {one.result.name for one in MEASUREMENTS}
    assert len(names) == len(MEASUREMENTS)
    assert names == files == figures == {name.replace("-", "_") for name in commands}


@pytest.mark.parametrize("one", MEASUREMENTS, ids=lambda m: m.result.name)
def test_a_command_has_the_options_of_its_measurement(one: Measurement) -> None:
    commands = {c.callback.__name__: c.callback for c in analyze.registered_commands if c.callback}
    options = inspect.signature(commands[one.result.name]).parameters
    assert set(inspect.signature(one.analyze).parameters) <= set(options)


def test_runs_are_checked_when_they_are_named() -> None:
    for wrong in ({"batch_size": 0}, {"split": "validation"}, {"workers": -1}, {"splits": "val"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ComparedRuns("run", **wrong)  # type: ignore[arg-type]
    assert ComparedRuns("run", split="test").split == "test"
    assert ComparedRuns("run", split="test", val="file.json").split == "val"


def test_records_are_written_as_json_reads_them() -> None:
    empty = without_boxes("AP")
    assert as_json({1: (2, (3.5, None)), "evaluated": empty}) == {
        "1": [2, [3.5, None]],
        "evaluated": {"AP": None},
    }
