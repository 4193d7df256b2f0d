"""Thousands of broken inputs:
none may end in a traceback, a hang, a dead process or all memory taken.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ..fuzz import annotations, checkpoints, images, overrides
from ..fuzz.harness import Try, failures


@pytest.mark.parametrize(
    ("attempt", "count"),
    [
        (annotations.attempt, 2000),
        (images.attempt, 2000),
        (checkpoints.attempt, 500),
        (overrides.attempt, 500),
    ],
    ids=["annotations", "images", "checkpoints", "overrides"],
)
def test_many(attempt: Try, count: int, tmp_path: Path) -> None:
    """A seed that fails can be tried alone: `attempt(seed, folder)`."""
    found = failures(attempt, range(count), tmp_path)
    assert not found, (
        f"{len(found)} of {count}, seeds {list(found)}; the first: {next(iter(found.values()))}"
    )
