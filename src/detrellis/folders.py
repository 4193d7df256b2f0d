"""The folder that a run or a study writes:
a new one, one process's alone for as long as that lives, and gone where nothing began.
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
from detrellis.outputs import LOCK, MADE

if sys.platform != "win32":
    import fcntl

HELD = (errno.EAGAIN, errno.EACCES)  # the lock is somebody else's


@contextlib.contextmanager
def new_folder(name: str, world: World) -> Iterator[Path]:
    """`runs/NAME-TIME`, the same in all processes;
    with a number where another run began in the same second. It is gone again where the block
    raises and has left nothing in it.
    """
    stem = Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder, number = stem, 1
    with contextlib.ExitStack() as stack:
        while world.is_main_process:
            try:
                stack.enter_context(_made(folder, exist_ok=False))
                break
            except FileExistsError:
                number += 1
                folder = Path(f"{stem}-{number}")
        yield all_gather(folder)[0]


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
    made; `check` is called in the main process once nobody else can change what it looks at. Where
    it, or the block, raises before anything is written, nothing is left of lock and folder. Raises
    `UserError`, in every process, that says who holds the folder, that it cannot be written, or
    what `check` raised.
    """
    with contextlib.ExitStack() as stack:
        refusal = "", ""
        if world is None or world.is_main_process:
            refusal = _taken(stack, folder, new, check)
        message, remedy = all_gather(refusal)[0]
        if message:
            raise UserError(message, remedy)
        yield


def _taken(
    stack: contextlib.ExitStack, folder: Path, new: bool, check: Callable[[], object]
) -> tuple[str, str]:
    """Makes, locks and checks the folder, which is held until the stack ends;
    why that cannot be, and the remedy.
    """
    try:
        if new:
            stack.enter_context(_made(folder))
        if (file := _lock(folder)) is not None:
            stack.enter_context(file)  # closed, it gives the lock back
            stack.enter_context(_unless_unused(folder))
        check()
    except UserError as error:
        return error.message, error.remedy
    except OSError as error:
        return f"{folder}: {error.strerror or error}", "Make room, or take another folder."
    return "", ""


@contextlib.contextmanager
def _made(folder: Path, *, exist_ok: bool = True) -> Iterator[None]:
    """Makes the folder; where the block raises,
    what was made for it, of those above too, is removed as far as it is empty.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            raise
        raise _unwritable(folder, error) from None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it: the rest stays
            for each in missing:
                each.rmdir()
        raise


@contextlib.contextmanager
def _unless_unused(folder: Path) -> Iterator[None]:
    """Where the block raises, and left nothing in the folder but what every run has,
    that is removed, before anybody else can have the lock.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if {each.name for each in folder.iterdir()} <= {LOCK, MADE}:
                (folder / MADE).unlink(missing_ok=True)
                (folder / LOCK).unlink()
        raise


def _unwritable(folder: Path, error: OSError) -> UserError:
    why = error.strerror or str(error)
    return UserError(
        f"{folder}: this folder cannot be written ({why})", "Take another folder, or make room."
    )


def _lock(folder: Path) -> FileIO | None:
    """The locked file, None where there is no such folder;
    what is wrong with that is told by whoever reads it.
    """
    try:
        file = (folder / LOCK).open("a+b", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unwritable(folder, error) from None
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
    if os.fstat(file.fileno()).st_nlink == 0:  # removed meanwhile, by a run that did not begin
        file.close()
        return _lock(folder)
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
