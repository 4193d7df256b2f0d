"""The tutorial, word by word: its commands in their order, in an empty folder.
Some fifteen minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from website.commands import blocks

from detrellis.data.shapes import write_shapes
from detrellis.recipes import RECIPES, find_recipe
from website import families

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"


def test_the_tutorial(tmp_path: Path) -> None:
    write_shapes(tmp_path / "my_data", train=24, val=8)  # what a reader brings
    shutil.copy(next((tmp_path / "my_data" / "images" / "val").iterdir()), tmp_path / "photo.jpg")
    install, *others = blocks(PAGE)
    # That is done: the commands that follow are of this environment
    assert "pip install" in install
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in others:
        subprocess.run(
            ["bash", "-euc", block], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True
        )
    for made in ("demo/predictions.jpg", "demo/run/report.html", "runs/first/report.html"):
        assert (tmp_path / made).stat().st_size > 10_000
    found = json.loads((tmp_path / "pictures" / "predictions.json").read_text())
    assert found
    report = json.loads((tmp_path / "demo" / "run" / "report.json").read_text())
    assert report["result"]["stats"]["AP"] > 0.5  # the page says 0.59


@pytest.mark.parametrize("name", RECIPES)
def test_stored_sizes_are_what_each_network_has(name: str) -> None:
    recipe = find_recipe(name)
    stored = families.costs()[families.digest(recipe)]
    assert {**families.measured(recipe), "first": stored["first"]} == {
        **stored,
        "size": tuple(stored["size"]),
    }
