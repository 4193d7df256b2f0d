"""Equal training time: the epochs that follow from steps' times,
and what a study that goes on keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detrellis.data.layout import find_data
from detrellis.errors import UserError
from detrellis.recipes import Recipe
from detrellis.study import pace
from detrellis.study.pace import paced
from detrellis.study.plan import StudyPlan
from detrellis.study.rows import plan_schemes
from detrellis.study.run import Resources

from ..small import small

# Of a made-up step, by the scheme that a recipe has
SECONDS = {None: 1.0, "align": 1.25, "group": 4.0}


def made_up(shapes: Path, schemes: str, *override: str) -> StudyPlan:
    chosen = ("schedule.epochs=10", "data.size=[64, 64]", *override)
    return plan_schemes(
        "tiny", schemes, find_data(shapes), seeds=(0,), equal="time", override=chosen
    )


def epochs(plan: StudyPlan) -> dict[str, int]:
    return {row.name: row.recipe.schedule.epochs for row in plan.rows}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Steps that take the seconds of `SECONDS`; the schemes of those that were timed."""
    asked: list[str | None] = []

    def step(
        recipe: Recipe, classes: int, device: torch.device, boxes: int
    ) -> Callable[[], str | None]:
        assert (classes, device.type) == (5, "cpu")
        assert 1 <= boxes <= 5  # the data set's mean
        scheme = next(
            (name for name in ("align", "group") if getattr(recipe.schemes, name) is not None), None
        )
        asked.append(scheme)
        return lambda: scheme

    monkeypatch.setattr(pace, "training_step", step)
    monkeypatch.setattr(pace, "seconds_of", lambda step, device: SECONDS[step()])
    return asked


@pytest.mark.usefixtures("timed")
def test_slower_rows_get_fewer_epochs(shapes: Path, tmp_path: Path) -> None:
    said: list[str] = []
    plan = paced(
        made_up(shapes, "none,align,group=3"), tmp_path, Resources(device="cpu"), said.append
    )
    assert plan.pace == {"align": 1.25, "group=3": 4.0}
    assert epochs(plan) == {"none": 10, "align": 8, "group=3": 2}  # 2.5, to even
    assert said == ["Timing steps of align, group=3, to give all rows the same time"]


def test_schemes_count_as_long_as_they_last(
    shapes: Path, tmp_path: Path, timed: list[str | None]
) -> None:
    rows = "none,group=3@0.25,align@0.5+group=3@0.25"
    plan = paced(made_up(shapes, rows), tmp_path, Resources(device="cpu"), print)
    both = 0.25 * 1.25 + 0.25 * 1.25 + 0.5  # made-up steps know one scheme, align before group
    assert plan.pace == {"group=3@0.25": 0.25 * 4 + 0.75, "align@0.5+group=3@0.25": both}
    assert timed == ["group", None, None, "align", "align", None, None]
    assert epochs(plan) == {"none": 10, "group=3@0.25": 6, "align@0.5+group=3@0.25": 9}


@pytest.mark.usefixtures("timed")
def test_a_row_has_an_epoch_at_least(shapes: Path, tmp_path: Path) -> None:
    plan = paced(
        made_up(shapes, "none,group=3", "schedule.epochs=1"),
        tmp_path,
        Resources(device="cpu"),
        print,
    )
    assert epochs(plan) == {"none": 1, "group=3": 1}


@pytest.mark.usefixtures("timed")
def test_time_is_counted_by_image(shapes: Path, tmp_path: Path) -> None:
    plan = made_up(shapes, "none,align")
    rows = tuple(
        replace(r, recipe=r.recipe.override("optim.batch_size=16")) if r.against else r
        for r in plan.rows
    )
    plan = paced(replace(plan, rows=rows), tmp_path, Resources(device="cpu"), print)
    assert plan.pace == {"align": 0.625}
    assert epochs(plan) == {"none": 10, "align": 16}


def test_a_study_that_goes_on_keeps_its_paces(
    shapes: Path, tmp_path: Path, timed: list[str | None]
) -> None:
    paced(made_up(shapes, "none,align"), tmp_path, Resources(device="cpu"), print).begin(tmp_path)
    timed.clear()
    wider = paced(made_up(shapes, "none,align,group=3"), tmp_path, Resources(device="cpu"), print)
    assert timed == ["group", None]
    assert epochs(wider) == {"none": 10, "align": 8, "group=3": 2}
    wider.begin(tmp_path)  # the same study, one row larger


def test_another_study_is_refused_before_anything_is_timed(
    shapes: Path, tmp_path: Path, timed: list[str | None]
) -> None:
    replace(made_up(shapes, "none,align"), pace=None).begin(tmp_path)
    with pytest.raises(
        UserError, match="another study in this folder: equal epochs, now equal time"
    ):
        paced(made_up(shapes, "none,align"), tmp_path, Resources(device="cpu"), print)
    assert not timed


def test_real_steps_are_timed(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "STEPS", 1)
    monkeypatch.setattr(pace, "WARMUP", 0)
    plan = made_up(shapes, "none,align")
    recipe = small("tiny").override("optim.batch_size=2")
    plan = replace(plan, rows=tuple(replace(row, recipe=recipe) for row in plan.rows))
    threads = torch.get_num_threads()
    found = paced(plan, tmp_path, Resources(device="cpu", threads=1), print)
    assert found.pace is not None
    assert found.pace["align"] > 0
    assert torch.get_num_threads() == threads


def test_a_step_too_large_for_the_memory(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pace, "training_step", step)
    with pytest.raises(
        UserError, match=r"align and none: a step of each does not fit .*\n.*optim.batch_size=2"
    ):
        paced(made_up(shapes, "none,align"), tmp_path, Resources(device="cpu"), print)
