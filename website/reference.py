"""The reference pages: every public name of the package with its parameters and its docstring,
and every command.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

import detrellis
from detrellis import arguments
from detrellis.cli import app

API_HEAD = """# Python interface

`import detrellis` brings these names. Everything else in the package may change from one version to the next.
Whatever a caller can put right is a `detrellis.UserError`, with a message and a remedy.
"""
CLI_HEAD = """# Commands

What `detrellis COMMAND --help` says, in one place. Exit codes: 0 done, 1 a finding or a failure, 2 wrong use, 130 and
143 after Ctrl-C and SIGTERM.
"""


def api_page() -> str:
    """A section for each public name, functions first,
    and the ranges that their parameters' types stand for.
    """
    names = sorted(
        detrellis.__all__, key=lambda name: (inspect.isclass(getattr(detrellis, name)), name)
    )
    sections = [
        part
        for name in names
        for part in _described(f"detrellis.{name}", getattr(detrellis, name), 2)
    ]
    return "\n\n".join([API_HEAD, *sections, *_kinds()]) + "\n"


def _described(name: str, value: Any, depth: int) -> Iterator[str]:
    yield f"{'#' * depth} `{name}`"
    if inspect.isclass(value):
        yield inspect.cleandoc(value.__doc__ or "")
        for member in sorted(vars(value).keys() | getattr(value, "__annotations__", {}).keys()):
            if not member.startswith("_"):
                yield from _member(value, member, depth + 1)
        return
    yield f"```python\n{signature(name, value)}\n```"
    yield inspect.cleandoc(inspect.getdoc(value) or "")


def _member(owner: type, name: str, depth: int) -> Iterator[str]:
    """A method like a function; a property or field with its type."""
    value = inspect.getattr_static(owner, name, None)
    value = getattr(value, "__func__", value)
    if inspect.isfunction(value):
        yield from _described(f"{owner.__name__}.{name}", value, depth)
        return
    reader = getattr(value, "fget", getattr(value, "func", None))
    kind = owner.__annotations__[name] if reader is None else reader.__annotations__["return"]
    about = inspect.cleandoc(reader.__doc__ or "") if reader is not None else ""
    yield f"* **`{owner.__name__}.{name}`**: `{kind}`" + (
        f". {' '.join(about.split())}" if about else ""
    )


def signature(name: str, function: Any) -> str:
    """The call with a parameter a line, `self` left out."""
    said = inspect.signature(function)
    parameters = [p for p in said.parameters.values() if p.name != "self"]
    lines, keywords = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keywords:
            lines.append("*")
            keywords = True
        line = str(p)
        if isinstance(p.annotation, str):  # Python quotes it
            line = line.replace(repr(p.annotation), p.annotation, 1)
        lines.append(line)
    result = "" if said.return_annotation is said.empty else f" -> {said.return_annotation}"
    inside = "".join(f"    {line},\n" for line in lines)
    return f"{name}(\n{inside}){result}" if lines else f"{name}(){result}"


def _kinds() -> Iterator[str]:
    """What the names of types stand for that the parameters have."""
    yield "## Types of parameters"
    rows = []
    for name, kind in vars(arguments).items():
        bounds = getattr(kind, "__metadata__", None)
        if bounds is not None:
            rows.append(f"| `{name}` | `{kind.__origin__.__name__}`, {bounds[0]} |")
        elif (
            name[0].isupper()
            and getattr(kind, "__args__", None)
            and all(isinstance(a, str) for a in kind.__args__)
        ):
            rows.append(f"| `{name}` | {' or '.join(f'`{word!r}`' for word in kind.__args__)} |")
    yield "\n".join(["| name | is |", "| --- | --- |", *rows])


def cli_page() -> str:
    """A section for each command: what it does, an example, its arguments and options."""
    root = typer.main.get_command(app)
    return (
        "\n\n".join(
            [
                CLI_HEAD,
                *(part for path, command in commands(root) for part in _command(path, command)),
            ]
        )
        + "\n"
    )


def commands(
    group: Any, path: tuple[str, ...] = ("detrellis",)
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words."""
    for name, command in group.commands.items():
        inside = hasattr(command, "commands")
        yield from commands(command, (*path, name)) if inside else [((*path, name), command)]


def _command(path: tuple[str, ...], command: Any) -> Iterator[str]:
    yield f"## `{' '.join(path)}`"
    about, _, example = inspect.cleandoc(command.help or "").partition("Example:")
    yield about.strip()
    if example:
        yield f"```bash\n{example.strip()}\n```"
    rows = [f"| {_names(p)} | {_cell(p.help or '')}{_default(p)} |" for p in command.params]
    yield "\n".join(["| | |", "| --- | --- |", *rows])


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in parameter.opts)


def _default(parameter: Any) -> str:
    value = parameter.default
    shown = (
        isinstance(value, int | float | str)
        and not isinstance(value, bool)
        and "default" not in (parameter.help or "")
    )
    return f" Default: `{value}`." if shown else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
