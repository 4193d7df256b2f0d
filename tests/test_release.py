"""What a release consists of names the same version, targets and extras everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import detrellis

ROOT = Path(__file__).parents[1]


def test_every_place_names_the_version() -> None:
    changelog = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changelog is not None
    assert changelog[1] == detrellis.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == detrellis.__version__


def test_the_workflow_calls_targets_that_exist() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    called = {job["target"] for job in jobs["target"]["strategy"]["matrix"]["include"]}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"test", "check"} <= called <= targets


def test_the_image_installs_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = re.search(r'"/source\[(.+?)\]"', (ROOT / "Dockerfile").read_text())
    assert installed is not None
    assert set(installed[1].split(",")) <= set(project["optional-dependencies"])
