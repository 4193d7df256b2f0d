"""What speaks to users: an error that names the place, what is wrong and the remedy;
advice; and commands to paste.
"""

from __future__ import annotations

import os
import reprlib
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

LONGEST = 300  # letters that a message quotes of what it was given

_BRIEF = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 24
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = LONGEST


class UserError(ValueError):
    """Something the user can put right.
    The command line prints it without a traceback and exits with 2.

    `message` says where and what; `remedy` says what to do about it.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n  {remedy}" if remedy else message)
        self.message, self.remedy = message, remedy


class Advice(UserWarning):
    """Something that works and that the user probably does not want; shown as one line."""


def listed(items: Sequence[object], limit: int, separator: str = ", ") -> str:
    """The first `limit` of the items, and how many more there are."""
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(map(str, items[:limit])) + more


def brief(value: object) -> str:
    """The value as Python writes it, short whatever it is:
    somebody else's file may hold anything.
    """
    return cut(_BRIEF.repr(value))


def cut(text: str) -> str:
    """The text, without its end where it is long."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def first_line(error: BaseException) -> str:
    """The first line of what another library's exception says."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def command(*words: object) -> str:
    """`detrellis train --resume 'my runs/first'`:
    what can be pasted into a shell, whatever the paths are called.
    """
    quoted = [
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
        for word in words
    ]
    return shell_line(["detrellis", *quoted])


def shell_line(words: Sequence[str]) -> str:
    """The words as the system's shell reads them back."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
