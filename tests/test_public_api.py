"""What users import changes only on purpose, and never without a line in the changelog."""

from __future__ import annotations

import inspect

import pytest

import detrellis

from .public_api import HEADER, STORED, interface, unreleased, written


def test_the_public_interface_is_the_recorded_one() -> None:
    recorded = STORED.read_text().partition("\n")[2]
    assert interface() == recorded, (
        "describe the change in CHANGELOG.md, then: python -m tests.public_api"
    )


def test_a_changed_interface_needs_the_changelog() -> None:
    changelog = "# Changelog\n\n## [2] - unreleased\n\n* One.\n\n## [1]\n\n* Old.\n"
    stored = f"{HEADER}{unreleased(changelog)}\nload(place)\n"
    with pytest.raises(ValueError, match=r"CHANGELOG\.md"):
        written(stored, "load(path)\n", changelog)
    assert written(stored, "load(place)\n", changelog) == stored
    described = changelog.replace("* One.", "* `load` names its argument `path`.")
    assert (
        written(stored, "load(path)\n", described)
        == f"{HEADER}{unreleased(described)}\nload(path)\n"
    )
    assert unreleased(changelog.replace("Old", "Older")) == unreleased(changelog)


def test_no_module_stands_in_the_place_of_a_verb() -> None:
    detrellis.load  # noqa: B018 - imports the interface, and with it every part of it
    for name in detrellis.__all__:
        assert not inspect.ismodule(getattr(detrellis, name)), name
