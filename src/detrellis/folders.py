"""The folder that a run or a study writes:
a new one, and one process's alone for as long as that lives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from detrellis.distributed import World, all_gather
from detrellis.errors import Advice, UserError
from detrellis.outputs import LOCK

if sys.platform != "win32":
    import fcntl

HELD = (errno.EAGAIN, errno.EACCES)  # the lock is somebody else's


def new_folder(name: str, world: World) -> Path:
    """`runs/NAME-TIME`, the same in all processes;
    with a number where another run began in the same second.
    """
    stem = Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder, number = stem, 1
    while world.is_main_process:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            folder = Path(f"{stem}-{number}")
    return all_gather(folder)[0]


@contextlib.contextmanager
def held(
    folder: Path,
    world: World | None = None,
    *,
    new: bool = False,
    check: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Keeps every other run out of the folder,
    on this machine and, where the file system has locks, on others.

    The system takes the lock back when the main process ends, whatever ended it. A `new` folder is
    made; `check` is called in the main process once nobody else can change what it looks at. Raises
    `UserError`, in every process, that says who holds the folder, that it cannot be written, or
    what `check` raised.
    """
    file, refusal = None, ("", "")
    if world is None or world.is_main_process:
        try:
            file = _lock(folder, new)
            check()
        except UserError as error:
            refusal = error.message, error.remedy
        except OSError as error:
            refusal = f"{folder}: {error.strerror or error}", "Make room, or take another folder."
    with contextlib.nullcontext() if file is None else file:
        message, remedy = all_gather(refusal)[0]
        if message:
            raise UserError(message, remedy)
        yield


def _lock(folder: Path, new: bool) -> FileIO | None:
    """The locked file, None where there is no such folder;
    what is wrong with that is told by whoever reads it.
    """
    try:
        if new:
            folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+b", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"{folder}: this folder cannot be written ({why})", "Take another folder, or make room."
        ) from None
    if sys.platform == "win32":  # Python has no lock there that other processes could read past
        return file
    # A worker that outlives this process would keep the lock
    os.register_at_fork(after_in_child=file.close)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise _refusal(folder, file) from None
        warnings.warn(
            Advice(f"{folder}: no locks here ({error.strerror}): nothing keeps another run out"),
            stacklevel=2,
        )
        return file
    with contextlib.suppress(OSError):  # a full disk: the lock holds, and does not say whose it is
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
    return file


def _refusal(folder: Path, file: FileIO) -> UserError:
    """Who is there, as that process has written it into the file."""
    with file:
        file.seek(0)
        holder = file.read(200).decode(errors="replace") or "another process"
    return UserError(
        f"{folder}: {holder}, writes here", "Wait for it or stop it, or take another --out."
    )
