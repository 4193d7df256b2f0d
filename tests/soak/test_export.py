"""Every family as an ONNX file, run: a quarter of an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from tests.export.test_export import FAMILIES, detects_the_same, operations, pictures, saved

__all__ = ["pictures"]


@pytest.mark.parametrize("tensorrt", [False, True], ids=["samples", "gathers"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_detects_the_same(
    name: str,
    tensorrt: bool,
    pictures: Path,
    tmp_path: Path,
) -> None:
    run = saved(name, tmp_path / "run")
    detects_the_same(run, pictures, tensorrt=tensorrt)
    if tensorrt:
        assert "GridSample" not in operations(run)


def test_other_runtimes_have_grid_samples(pictures: Path, tmp_path: Path) -> None:
    run = saved("small", tmp_path / "run")
    detects_the_same(run, pictures)
    assert "GridSample" in operations(run)
