"""Imports point one way only, and never in a circle (docs/architecture.md, "The house").

Every import counts: at the top of a module, inside a function, and for type checkers alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "detrellis"
FILES = sorted(SOURCE.rglob("*.py"))

# Each room with the rooms that it may import from, besides itself. A file at the top is a room of
# its own.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"api", "errors", "version"},
    "__main__": {"cli"},
    "version": set(),
    "errors": set(),
    "distributed": {"errors"},
    "terminal": set(),
    "arguments": {"errors"},
    "fields": {"errors"},
    "yaml_reader": set(),
    "atomic": set(),
    "signals": set(),
    "outputs": {"atomic", "errors"},
    "folders": {"distributed", "outputs", "errors"},
    "types": set(),
    "boxes": set(),
    "rle": set(),
    "overlay": {"rle"},
    "masks": {"types", "rle"},
    "precision": {"errors"},
    "nn": {"types", "boxes", "precision", "errors"},
    "postprocess": {"types", "boxes", "masks", "rle"},
    "detector": {"types", "errors", "nn", "postprocess"},
    "mask_points": {"types"},
    "matching": {"types", "boxes", "mask_points"},
    "losses": {"types", "boxes"},
    "pairs": {"types", "boxes", "nn", "losses"},
    "set_loss": {"types", "nn", "losses", "pairs"},
    "supervision": {"types", "matching", "pairs", "set_loss", "mask_points"},
    "salience": {"types", "boxes", "nn"},
    "schemes": {
        *(
            "types",
            "boxes",
            "nn",
            "postprocess",
            "detector",
            "matching",
            "losses",
            "pairs",
            "set_loss",
            "supervision",
        ),
        *("distributed", "fields", "errors"),
    },
    "training": {
        *(
            "types",
            "boxes",
            "nn",
            "detector",
            "matching",
            "losses",
            "mask_points",
            "salience",
            "supervision",
            "schemes",
        ),
        "distributed",
    },
    "data": {"types", "boxes", "rle", "outputs", "yaml_reader", "errors"},
    "recipes": {
        *(
            "types",
            "boxes",
            "nn",
            "postprocess",
            "detector",
            "matching",
            "mask_points",
            "set_loss",
            "supervision",
            "schemes",
        ),
        *("training", "fields", "yaml_reader", "errors"),
    },
    "visualize": {"types", "data", "overlay", "errors"},
    "predictions": {
        *("types", "rle", "detector", "data", "recipes", "engine", "visualize"),
        *("arguments", "distributed", "outputs", "errors"),
    },
    "webpage": set(),
    "report": {
        "data",
        "engine",
        "predictions",
        "arguments",
        "outputs",
        "errors",
        "visualize",
        "version",
        "webpage",
    },
    "demo": {"api", "data", "recipes", "engine", "outputs", "visualize", "errors", "terminal"},
    "engine": {
        *(
            "types",
            "boxes",
            "rle",
            "nn",
            "postprocess",
            "detector",
            "precision",
            "training",
            "data",
            "recipes",
            "visualize",
        ),
        *("arguments", "atomic", "distributed", "errors", "signals", "terminal", "version"),
    },
    "interop": {
        "types",
        "detector",
        "data",
        "recipes",
        "engine",
        "arguments",
        "outputs",
        "atomic",
        "errors",
    },
    "serving": {
        *("data", "engine", "interop", "loading", "predictions", "report"),
        *("errors", "version", "webpage"),
    },
    "hub": {"engine", "interop", "report", "arguments", "errors"},
    "exported": {"types", "detector", "engine", "recipes", "errors"},
    "loading": {
        *("detector", "data", "recipes", "engine", "interop", "predictions", "exported"),
        *("precision", "arguments", "distributed", "errors"),
    },
    "exporting": {
        *(
            "types",
            "boxes",
            "nn",
            "detector",
            "data",
            "recipes",
            "engine",
            "interop",
            "predictions",
            "exported",
            "loading",
        ),
        *("arguments", "distributed", "outputs", "errors"),
    },
    "api": {"verbs", "engine", "interop", "predictions", "loading", "exporting", "hub"},
    "verbs": {
        *("data", "recipes", "engine", "interop", "predictions", "loading", "report", "serving"),
        *("arguments", "distributed", "folders", "outputs", "errors"),
    },
    "analysis": {
        *("types", "boxes", "detector", "matching", "supervision", "schemes", "training"),
        *("data", "recipes", "engine", "predictions", "loading"),
        *("arguments", "distributed", "outputs", "errors", "visualize"),
    },
    "study": {
        *("api", "data", "recipes", "engine", "analysis"),
        *(
            "distributed",
            "folders",
            "outputs",
            "atomic",
            "errors",
            "signals",
            "terminal",
            "version",
            "webpage",
        ),
    },
    "cli": {
        *(
            "api",
            "demo",
            "predictions",
            "data",
            "recipes",
            "engine",
            "visualize",
            "analysis",
            "study",
        ),
        *("arguments", "errors", "signals", "terminal", "version"),
    },
}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_rooms(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {room(a.name) for a in node.names if a.name.split(".")[0] == "detrellis"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "detrellis":
            module = node.module or ""
            found |= (
                {room(module)}
                if "." in module
                else {room(f"{module}.{a.name}") for a in node.names}
            )
    return {r if r in ALLOWED else "__init__" for r in found}


def test_the_house_names_each_room() -> None:
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    house = page.partition("## The house")[2].partition("tests/ ")[0]
    assert {name for name in ALLOWED if name not in re.findall(r"\w+", house)} == {
        "__init__",
        "__main__",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows(path: Path) -> None:
    relative = path.relative_to(SOURCE)
    own = relative.parts[0].removesuffix(".py")
    assert own in ALLOWED, f"{relative}: name its room, and what it may import, in ALLOWED"
    wrong = imported_rooms(path) - ALLOWED[own] - {own}
    assert not wrong, f"{relative} imports from {sorted(wrong)}"


def modules() -> dict[str, Path]:
    paths = {
        ".".join(("detrellis", *path.relative_to(SOURCE).with_suffix("").parts)): path
        for path in FILES
    }
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def imported_modules(path: Path, known: Collection[str]) -> set[str]:
    """Which of the `known` modules a file names. A package counts only where something is taken
    from its `__init__`: that Python runs this one before any module of the package is no arrow."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{a.name}" for a in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & set(known)


def reached(start: str, arrows: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = arrows[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """The modules that import each other, directly or through others."""
    reach = {name: reached(name, arrows) for name in arrows}
    found = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in arrows}
    return sorted(list(circle) for circle in found if circle)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d", "a"}, "e": set()}) == [
        ["b", "c"],
        ["d"],
    ]


def test_there_are_no_circles() -> None:
    known = modules()
    arrows = {name: imported_modules(path, known) for name, path in known.items()}
    assert sum(map(len, arrows.values())) > len(arrows)
    assert not (found := circles(arrows)), f"these import each other: {found}"
