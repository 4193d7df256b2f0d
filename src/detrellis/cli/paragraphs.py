"""Help without the line breaks of its source: a terminal breaks each paragraph where it is wide."""

from __future__ import annotations

import inspect

import typer


def join_lines(group: typer.Typer) -> None:
    """Put each paragraph of every command's docstring, in the group and in its groups, on one line.

    typer does so with the first paragraph alone.
    """
    for command in group.registered_commands:
        command.help = joined(command.help or inspect.getdoc(command.callback) or "")
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            join_lines(inner.typer_instance)


def joined(text: str) -> str:
    """The text with a line for each paragraph, and an empty one between two."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))
