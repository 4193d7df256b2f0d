"""A run that is killed again and again ends with the same bits as one that is not.
`tests/soak` kills it 20 times.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .kills import assert_never_killed, trained
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
