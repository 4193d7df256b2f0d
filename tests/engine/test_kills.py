"""A run that is killed again and again ends with the same bits as one that is not, in one process
or in two. `tests/soak` kills either 20 times.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .kills import assert_never_killed, trained, trained_by_two
from .test_saving import SETTINGS

EPOCHS = 2


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody kills."""
    base = tmp_path_factory.mktemp("whole")
    assert trained(None, base / "told", shapes, base / "run", SETTINGS, EPOCHS) is None
    return base / "run"


def test_a_run_that_is_killed_at_random_moments(shapes: Path, whole: Path, tmp_path: Path) -> None:
    told, out = tmp_path / "told", tmp_path / "run"
    draw = random.Random(3)
    for _ in range(3):
        assert trained(draw.randint(5, 25), told, shapes, out, SETTINGS, EPOCHS) is not None
    assert trained(None, told, shapes, out, SETTINGS, EPOCHS) is None
    assert_never_killed(whole, tmp_path / "run")


def test_one_of_two_processes_that_is_killed(shapes: Path, tmp_path: Path) -> None:
    """The first in the first epoch, where it may write; then the other in the second."""
    told, whole, out = tmp_path / "told", tmp_path / "whole", tmp_path / "run"
    run = (told, shapes, whole, SETTINGS, EPOCHS)
    assert trained_by_two(None, 0, *run) is None
    run = (told, shapes, out, SETTINGS, EPOCHS)
    draw = random.Random(2)
    for rank, moments in enumerate((20, 12)):
        assert trained_by_two(draw.randint(2, moments), rank, *run) is not None
    assert trained_by_two(None, 0, *run) is None
    assert_never_killed(whole, out)
