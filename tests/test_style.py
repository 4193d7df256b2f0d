"""The style limits of docs/architecture.md,
section "House style", checked on the package's source.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "detrellis"
FILES = sorted(SOURCE.rglob("*.py"))

FILE_LINES, FUNCTION_LINES, NESTING, ARGUMENTS = 400, 60, 3, 10
ROOMY = ("recipes", "cli", "verbs")
FLOW = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith, ast.Match)


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Deepest control flow below `node`;
    an `elif` chain counts once, a function inside starts anew.
    """
    deepest = depth
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        chained = field == "orelse" and isinstance(node, ast.If) and len(children) == 1
        for child in children:
            if not isinstance(child, ast.AST) or isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef
            ):
                continue
            deeper = isinstance(child, FLOW) and not (chained and isinstance(child, ast.If))
            deepest = max(deepest, nesting(child, depth + deeper))
    return deepest


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_limits(path: Path) -> None:
    text = path.read_text()
    found = []
    if (lines := text.count("\n")) > FILE_LINES:
        found.append(f"{lines} lines, at most {FILE_LINES}")
    for f in functions(ast.parse(text)):
        arguments = len(f.args.posonlyargs + f.args.args + f.args.kwonlyargs)
        # A command's parameters are its user's flags, and a recipe's or constructor's are its
        # dials: counted apart.
        roomy = f.name == "__init__" or path.relative_to(SOURCE).parts[0] in ROOMY
        length = (f.end_lineno or f.lineno) - f.lineno + 1
        if length > FUNCTION_LINES:
            found.append(f"{f.name}, line {f.lineno}: {length} lines, at most {FUNCTION_LINES}")
        if (depth := nesting(f)) > NESTING:
            found.append(f"{f.name}, line {f.lineno}: nested {depth} deep, at most {NESTING}")
        if arguments > (2 * ARGUMENTS if roomy else ARGUMENTS):
            found.append(f"{f.name}, line {f.lineno}: {arguments} arguments")
    assert not found, "\n".join([str(path), *found])


def own_classes() -> dict[str, list[str]]:
    bases: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [
                    b.attr if isinstance(b, ast.Attribute) else getattr(b, "id", "")
                    for b in node.bases
                ]
    return bases


def test_inheritance_is_one_level_deep() -> None:
    bases = own_classes()
    deep = {
        c: b
        for c, bs in bases.items()
        for b in bs
        if b in bases and any(g in bases for g in bases[b])
    }
    assert not deep, f"more than one level of our own inheritance: {deep}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    public = [
        n
        for n in tree.body
        if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")
    ]
    missing = [n.name for n in public if not ast.get_docstring(n)]
    assert not missing, f"{path}: no docstring on {missing}"
