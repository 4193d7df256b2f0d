"""The public interface as text:
what stands in `tests/public_api.txt`, and may not change without the changelog.

python -m tests.public_api    # writes the file anew, once CHANGELOG.md says what changed
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import detrellis

STORED = Path(__file__).with_name("public_api.txt")
CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
HEADER = "# Unreleased changes when this was written: "


def interface() -> str:
    """Every public name with its parameters, types and defaults,
    a line each, members of classes after them.
    """
    lines = [
        line
        for name in sorted(detrellis.__all__)
        for line in _described(name, getattr(detrellis, name))
    ]
    return "\n".join(lines) + "\n"


def unreleased(changelog: str) -> str:
    """A digest of the changelog's first section, the one that is not released yet."""
    first = changelog.split("\n## ")[1]
    return hashlib.sha256(" ".join(first.split()).encode()).hexdigest()[:16]


def written(before: str, now: str, changelog: str) -> str:
    """The file's new text. Raises `ValueError` where the interface differs,
    and the changelog is as it was.
    """
    header, _, stored = before.partition("\n")
    if stored != now and header == HEADER + unreleased(changelog):
        raise ValueError(
            "The public interface differs, and CHANGELOG.md does not say how: describe it "
            "there first."
        )
    return f"{HEADER}{unreleased(changelog)}\n{now}"


def _described(name: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        yield f"{name}{inspect.signature(value)}"
        return
    yield f"class {name}{inspect.signature(value)}"
    for member in sorted(vars(value).keys() | getattr(value, "__annotations__", {}).keys()):
        if not member.startswith("_"):
            yield f"    {name}.{member}{_member(value, member)}"


def _member(owner: type, name: str) -> str:
    """A method's parameters, or the type of a property or field."""
    value = inspect.getattr_static(owner, name, None)
    value = getattr(value, "__func__", value)
    if inspect.isfunction(value):
        return str(inspect.signature(value))
    reader = getattr(value, "fget", getattr(value, "func", None))
    if reader is not None:
        return f": {reader.__annotations__['return']}"
    return f": {owner.__annotations__[name]}"


if __name__ == "__main__":
    try:
        STORED.write_text(written(STORED.read_text(), interface(), CHANGELOG.read_text()))
    except ValueError as error:
        sys.exit(str(error))
