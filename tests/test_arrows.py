"""Imports point one way only (docs/architecture.md, "The house")."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "detrellis"

# Each room with the rooms that it may import from, besides itself. A file at the top is a room of its own.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"api", "errors"},
    "__main__": {"cli"},
    "errors": set(),
    "terminal": set(),
    "arguments": {"errors"},
    "fields": {"errors"},
    "atomic": set(),
    "outputs": {"atomic", "errors"},
    "types": set(),
    "boxes": set(),
    "nn": {"types", "boxes", "errors"},
    "detector": {"types", "boxes", "nn"},
    "matching": {"types", "boxes"},
    "losses": {"types", "boxes"},
    "supervision": {"types", "boxes", "matching", "losses"},
    "schemes": {"types", "boxes", "nn", "detector", "matching", "losses", "supervision", "fields", "errors"},
    "training": {"types", "boxes", "nn", "detector", "matching", "losses", "supervision", "schemes"},
    "data": {"types", "boxes", "outputs", "errors"},
    "recipes": {
        *("types", "boxes", "nn", "detector", "matching", "supervision", "schemes", "training"),
        *("fields", "errors"),
    },
    "visualize": {"types", "data", "errors"},
    "predictions": {"types", "detector", "data", "recipes", "engine", "visualize", "arguments", "outputs", "errors"},
    "demo": {"api", "data", "recipes", "engine", "outputs", "visualize", "errors", "terminal"},
    "engine": {
        *("types", "boxes", "nn", "detector", "training", "data", "recipes"),
        *("arguments", "atomic", "errors", "terminal", "__init__"),
    },
    "interop": {"types", "detector", "data", "recipes", "engine", "arguments", "outputs", "atomic", "errors"},
    "api": {
        *("types", "detector", "training", "data", "recipes", "engine", "interop"),
        *("predictions", "arguments", "outputs", "errors", "__init__"),
    },
    "analysis": {
        *("types", "boxes", "detector", "matching", "supervision", "schemes", "training"),
        *("data", "recipes", "engine", "api", "arguments", "outputs", "errors", "visualize"),
    },
    "study": {"api", "data", "recipes", "engine", "analysis", "outputs", "atomic", "errors", "terminal", "__init__"},
    "cli": {
        *("api", "demo", "predictions", "data", "recipes", "engine", "visualize", "analysis", "study"),
        *("arguments", "errors", "terminal", "__init__"),
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
            found |= {room(module)} if "." in module else {room(f"{module}.{a.name}") for a in node.names}
    return {r if r in ALLOWED else "__init__" for r in found}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows(path: Path) -> None:
    relative = path.relative_to(SOURCE)
    own = relative.parts[0].removesuffix(".py")
    assert own in ALLOWED, f"{relative}: name its room, and what it may import, in ALLOWED"
    wrong = imported_rooms(path) - ALLOWED[own] - {own}
    assert not wrong, f"{relative} imports from {sorted(wrong)}"
