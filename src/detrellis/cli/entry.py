"""From the first moment of a command to its exit code:
refusals, interruptions, closed pipes, and our own mistakes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import typer

from detrellis.cli.options import IS_MAIN_PROCESS, errors, print_json
from detrellis.errors import Advice, UserError
from detrellis.signals import interrupting
from detrellis.terminal import never_fail_to_print
from detrellis.version import __version__

WRONG_USE, FAILED, INTERRUPTED = 2, 1, 128 + signal.SIGINT
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room, or name another disk with --out."),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        "Check the permissions of this file and of the folders above it.",
    ),
}
ROOM = (
    "Take `train --auto-batch`, -o optim.checkpointing=true, a smaller -o data.size or "
    "--batch-size, fewer --workers, or end other programs."
)


class Refusal(NamedTuple):
    """What is printed for an exception: the message and the remedy, and the exit code."""

    message: str
    remedy: str = ""
    code: int = WRONG_USE


def start(app: typer.Typer) -> NoReturn:
    """Run `app` on the command line's words and leave with its exit code.

    What the user can put right is a message and exit code 2, never a traceback; with `--json` it is
    JSON on standard output as well. Ctrl-C is exit code 130 and SIGTERM 143, whatever the verb made
    of them. Training handles them itself, says so, and leaves with that code.
    """
    never_fail_to_print()
    with warnings.catch_warnings(), interrupting() as caught:
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        code = _run(app, caught)
    if caught:
        if IS_MAIN_PROCESS:
            errors.say("Stopped.")
        code = 128 + caught[0]
    raise SystemExit(code)


def _run(app: typer.Typer, caught: list[int]) -> int:
    try:
        code = app(prog_name="detrellis", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except SystemExit as stopped:  # a closed pipe, told by whoever wrote to it
        return stopped.code if isinstance(stopped.code, int) else FAILED
    except BrokenPipeError:
        _close_quietly()
        return FAILED
    except Exception as error:
        if caught:  # the interruption, in the clothes that a half-imported library gave it
            return INTERRUPTED
        return _refuse(refusal(error))
    return code if isinstance(code, int) else 0


def refusal(error: Exception) -> Refusal:
    """What went wrong and what to do about it.
    For a mistake of ours, prints the traceback and says so.
    """
    if isinstance(error, UserError):
        return Refusal(error.message, error.remedy)
    # Of typer, whose classes have other homes in other versions
    if hasattr(error, "format_message"):
        return _wrong_words(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Refusal("out of memory", ROOM, FAILED)
    if isinstance(error, OSError) and error.errno is not None:
        return _from_system(error)
    traceback.print_exception(error)
    message = f"{type(error).__name__}: {error}"
    versions = f"Detrellis {__version__}, Python {sys.version.split()[0]}, {sys.platform}"
    return Refusal(
        message,
        f"This is a mistake in Detrellis: please report it with the lines above ({versions}).",
        FAILED,
    )


def _wrong_words(error: Any) -> Refusal:
    """A verb or an option that does not exist, or one that is missing;
    with the example from the verb's help.
    """
    context = getattr(error, "ctx", None)
    message = error.format_message().strip().rstrip(".")
    if context is None or not message:  # the latter: no words at all, and the help has been printed
        return Refusal(message)
    verb = context.command_path
    if context.parent is None and message.startswith("No such option"):
        return Refusal(
            message,
            (
                "Options stand after the verb: detrellis check --data my_data. Verbs: detrellis "
                "--help."
            ),
        )
    example = next(
        (line for line in (context.command.help or "").splitlines() if "Example:" in line), ""
    )
    told = [example.strip().replace("Example", "For example")] if example else []
    return Refusal(message, "\n".join([*told, f"See {verb} --help."]))


def _from_system(error: OSError) -> Refusal:
    """A full disk, a folder that may not be written, too many open files."""
    where = [
        os.fsdecode(name)
        for name in (error.filename, error.filename2)
        if isinstance(name, (str, bytes, os.PathLike))
    ]
    message = ": ".join([*where, error.strerror or str(error)])
    return Refusal(message, REMEDIES.get(error.errno or 0, ""))


def _refuse(refused: Refusal) -> int:
    if refused.message:
        errors.say(("error", "bold red"), f" {refused.message}")
    for line in refused.remedy.splitlines():
        errors.say(f"  {line}")
    if "--json" in sys.argv:
        print_json({"error": {"message": refused.message, "remedy": refused.remedy}})
    return refused.code


def _close_quietly() -> None:
    """Nobody reads on: what is left in the buffer goes nowhere,
    and the interpreter need not say so.
    """
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(
    usual: Callable[..., None], message: Warning | str, *where: Any, **more: Any
) -> None:
    if not isinstance(message, Advice):
        usual(message, *where, **more)
    elif IS_MAIN_PROCESS:
        errors.say(("note", "bold yellow"), f" {message}")
