"""Mutations of values, texts, bytes and files, each drawn from a generator that a seed made."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

Random = np.random.Generator

NAMES = (
    "",
    " ",
    ".",
    "..",
    "../../x.jpg",
    "/etc/passwd",
    "/",
    "C:\\x.jpg",
    "a\\b.jpg",
    "a\nb.jpg",
    "a\x1b[31mb.jpg",
    "a\0b.jpg",
    "'\"`$(x)",
    "<script>alert(1)</script>",
    "猫 ünï.jpg",
    "\ud800",
    "CON",
    "x" * 300 + ".jpg",
    "%20.jpg",
    "http://[x/y.jpg",
    "file:///x?d=",
    "train_0.jpg/",
    "=1+1",
    "\u202ex.jpg",
)
# What may stand where something else belongs.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3.7,
    1e308,
    -1e308,
    1e-320,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31,
    2**63 - 1,
    -(2**63),
    2**63,
    2**64,
    10**400,
    "7",
    " 7 ",
    "1e5",
    "nan",
    "٣",
    "0x10",
    [],
    {},
    [[]],
    [None],
    [[1, 2], [3]],
    [1, 2, 3, 4],
    [0, 0, 0, 0],
    [1, 2, 3],
    ["1", "2", "3", "4"],
    [1e308, 1e308, 1e308, 1e308],
    [float("nan")] * 4,
    {"x": 1, "y": [2]},
    {"size": [32, 48], "counts": "zz"},
    {"size": [-1, 10**9], "counts": [1, 2, 3]},
    {"size": None, "counts": None},
    *NAMES,
)
LETTERS = (
    "\0",
    "\r\n",
    "\r",
    "\n\n",
    "\t",
    "\ufeff",
    "é",
    "\x1b[2J",
    "\u2028",
    ",",
    ";",
    '"',
    "'",
    "{",
    "]",
    "<",
    "&",
    ":",
)


def pick(random: Random, options: Any) -> Any:
    """One of the options."""
    return options[int(random.integers(len(options)))]


def spoil_value(random: Random, value: Any) -> Any:
    """The nest of JSON values with one place changed:
    another type, a doubled, missing or foreign entry.
    """
    value = copy.deepcopy(value)
    holder, key = pick(random, _places(value))
    way = int(random.integers(6))
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif way == 2 and isinstance(holder, dict):
        holder[str(pick(random, VALUES))] = holder.pop(key)
    elif way == 3:
        holder[key] = copy.deepcopy(pick(random, _places(value)))[0]
    else:
        holder[key] = copy.deepcopy(pick(random, VALUES))
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every entry of the nest: what holds it, and its key there."""
    found = []
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)) and value[key]:
            found += _places(value[key])
    return found


def spoil_text(random: Random, text: str) -> str:
    """The text with a field, line or letter changed, missing, doubled or moved."""
    way = int(random.integers(7))
    lines = text.splitlines(keepends=True) or [""]
    place = int(random.integers(len(lines)))
    if way == 0:
        del lines[place]
    elif way == 1:
        lines.insert(place, lines[place])
    elif way == 2:
        lines[place] = lines[int(random.integers(len(lines)))]
    elif way <= 4:  # a word becomes another value
        line = lines[place]
        start, end = sorted(int(random.integers(len(line) + 1)) for _ in range(2))
        lines[place] = line[:start] + str(pick(random, VALUES)) + line[min(end, start + 8) :]
    else:
        at = int(random.integers(len(text) + 1))
        gone = int(random.integers(4)) * int(random.integers(8))
        return text[:at] + pick(random, (*LETTERS, str(pick(random, VALUES)))) + text[at + gone :]
    return "".join(lines)


def spoil_bytes(random: Random, data: bytes) -> bytes:
    """The bytes cut off, with some changed, doubled or gone, or in another clothing:
    an archive, another encoding.
    """
    way = int(random.integers(10))
    at = int(random.integers(len(data) + 1))
    if way == 0:
        return b""
    if way == 1:
        return data[:at]
    if way <= 4:
        changed = bytearray(data)
        for place in random.integers(max(len(data), 1), size=int(random.integers(1, 9))).tolist():
            changed[place : place + 1] = bytes([int(random.integers(256))])
        return bytes(changed)
    if way == 5:
        end = at + int(random.integers(64))
        return data[:at] + data[end:]
    if way == 6:
        return gzip.compress(data)
    if way == 7:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("../../x", data)
        return packed.getvalue()
    if way == 8:
        text = data.decode("utf-8", "replace")
        return text.encode(
            pick(random, ("utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252")), "replace"
        )
    return data.replace(b"\n", b"\r\n") if at % 2 else random.bytes(int(random.integers(1, 200)))


def spoil_file(random: Random, path: Path) -> None:
    """The file with its content spoilt in the way of its kind, or something else in its place."""
    way = int(random.integers(12))
    if way == 0:
        return _replace(random, path)
    data = path.read_bytes()
    if way <= 3:
        data = spoil_bytes(random, data)
    elif path.suffix == ".json" and way <= 10:
        try:
            content = json.loads(data)
            data = json.dumps(spoil_value(random, content)).encode()
        except (ValueError, IndexError, TypeError, KeyError):  # spoilt before
            data = spoil_bytes(random, data)
    else:
        data = spoil_text(random, data.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
    path.unlink()  # others may link to it
    path.write_bytes(data)


def _replace(random: Random, path: Path) -> None:
    """Something else at the place of a file:
    a folder, a link to nowhere or itself, another name, nothing, a pipe.
    """
    way = int(random.integers(8))
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    content = path.read_bytes()
    path.unlink()
    if way == 0:
        path.mkdir()
        (path / "x").write_text("1")
    elif way == 1:
        path.symlink_to("nowhere")
    elif way == 2:
        path.symlink_to(path.name)
    elif way == 3 and others:
        path.write_bytes(pick(random, others).read_bytes())
    elif way == 4:
        os.mkfifo(path)
    elif way == 5:
        path.symlink_to("/dev/zero")
    elif way == 6:
        name = pick(
            random,
            [
                n
                for n in NAMES
                if "/" not in n and "\0" not in n and 2 < len(n) < 200 and n.isprintable()
            ],
        )
        path.with_name(Path(name).stem + path.suffix).write_bytes(content)
