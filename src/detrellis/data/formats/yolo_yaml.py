"""YOLO's `data.yaml`: names as the text that stands there, and the paths that it gives.

YAML reads `no` as false, `007` as 7, `1e3` as 1000.0 and `null` as nothing. Here every scalar stays
text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from detrellis.data.files import read_text, subfolders
from detrellis.data.formats.lookup import find_place
from detrellis.errors import UserError
from detrellis.yaml_reader import parse

SUFFIXES = (".yaml", ".yml")
NOTHING = ("", "null", "~", "none", "false", "no")  # where a path or a shape could stand
SHAPE = (
    "data.yaml needs `names:` (a list, or numbers to names) and `train:`, and should have `val:`."
)


class Keypoints(NamedTuple):
    """What the yaml says of lines of more than five fields."""

    points: int  # behind each box; 0: such lines are polygons
    values: int  # of each keypoint: x, y and perhaps whether it is visible


def load_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a yaml file, all scalars as text.
    Raises `UserError` with the line where it is malformed.
    """
    try:
        text = read_text(file)
        node, content = parse(text)
    except yaml.YAMLError as error:
        tab = "Write spaces where there are tabs. " if "'\\t'" in str(error) else ""
        raise UserError(
            f"{file}: malformed yaml ({' '.join(str(error).split())})", f"{tab}{SHAPE}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{file}: {'not a yaml mapping' if text.strip() else 'the file is empty'}", SHAPE
        )
    if twice := _repeated_key(node):
        raise UserError(f"{file}: {twice}", "Remove one of them.")
    return content


def _repeated_key(node: yaml.Node | None) -> str:
    """`names:` is there twice (lines 3 and 7), "" where no key is:
    PyYAML takes the last one without a word.
    """
    if not isinstance(node, yaml.MappingNode):
        return ""
    first: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if first.setdefault(str(key.value), line) != line:
            return f"`{key.value}:` is there twice (lines {first[str(key.value)]} and {line})"
        if inside := _repeated_key(value):
            return inside
    return ""


def given(content: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The paths under the first of the keys that has any."""
    for name in names:
        entries = content.get(name)
        texts = entries if isinstance(entries, list) else [entries]
        paths = [
            text for text in texts if isinstance(text, str) and text.strip().lower() not in NOTHING
        ]
        if paths:
            return paths
    return []


def locate(text: str, file: Path, content: Mapping[str, Any]) -> Path | None:
    """The folder or list that the yaml means,
    also when it was written for another machine or working folder.
    """
    base = content.get("path")
    # A folder for settings has no data in it: there the paths are relative to the one above.
    places = (
        [file.parent] if subfolders(file.parent, depth=1) else [file.parent, file.parent.parent]
    )
    root = find_place(base, places) if isinstance(base, str) and base.strip() else None
    place = find_place(text, [*([root] if root is not None else []), *places])
    return None if place is None else place.resolve()


def class_names(file: Path) -> tuple[tuple[int, str], ...]:
    """(id, name) from `names:` of a yaml file, or from the lines of a class list."""
    if file.suffix.lower() not in SUFFIXES:
        return _lines(file)
    content = load_yaml(file)
    names = content.get("names")
    if isinstance(names, str):
        names = _from_text(names, file)
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(enumerate(names))
    if isinstance(names, tuple):
        return names
    if isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values()):
        # {0: cat}, and {cat: 0}
        for pairs in (names.items(), [(i, name) for name, i in names.items()]):
            if all(key.strip().isdecimal() for key, _ in pairs):
                return tuple(sorted((int(key), name) for key, name in pairs))
    raise UserError(f"{file}: `names:` is {'missing' if not names else repr(names)[:80]}", SHAPE)


def _lines(file: Path) -> tuple[tuple[int, str], ...]:
    lines = [line.strip() for line in read_text(file).splitlines()]
    return tuple(enumerate(line for line in lines if line))


def _from_text(text: str, file: Path) -> Any:
    """A list in quotes, names with commas between them, or the file that has the names."""
    if text.strip().startswith(("[", "{")):
        try:
            return parse(text)[1]
        except yaml.YAMLError:
            return text
    place = find_place(text, [file.parent]) if text.strip() else None
    if place is not None and place.is_file():
        return class_names(place)
    return [name.strip() for name in text.split(",")] if "," in text else text


def class_count(file: Path) -> int | None:
    """`nc:` of a yaml file; None where there is none, or no number."""
    text = load_yaml(file).get("nc") if file.suffix.lower() in SUFFIXES else None
    return int(text) if isinstance(text, str) and text.strip().isdecimal() else None


def keypoints(file: Path) -> Keypoints | None:
    """`kpt_shape:` of a yaml file; None where there is none.
    An empty one says that there are no keypoints.
    """
    content = load_yaml(file) if file.suffix.lower() in SUFFIXES else {}
    if "kpt_shape" not in content:
        return None
    shape = content["kpt_shape"]
    if not shape or (isinstance(shape, str) and shape.strip().lower() in (*NOTHING, "0")):
        return Keypoints(0, 0)
    if (
        isinstance(shape, list)
        and len(shape) == 2
        and all(str(n).strip().isdecimal() for n in shape)
    ):
        points, values = (int(n) for n in shape)
        if points == 0 or values in (2, 3):
            return Keypoints(points, values)
    what = f"{file}: `kpt_shape:` is {shape!r}, not the number of keypoints and 2 or 3"
    raise UserError(
        what, "Write e.g. `kpt_shape: [17, 3]`, or `kpt_shape: []` where there are none."
    )
