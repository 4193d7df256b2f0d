"""Writing files so that readers see the old one or the new one,
never a part, whatever ends the process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

Write = Callable[[Path], object]

FULL = 65536  # bytes that are left, at most, of a disk on which writing fails
PARTIAL = re.compile(r"\..+\.\d+\.partial")


def write_beside(path: Path, write: Write) -> Path:
    """What `write` puts into a file beside `path`, whole and on the disk;
    its folder is made where it is missing.

    The file has the permissions of any new file there: some libraries write through temporary ones
    that only their owner may read. Nothing is left where `write` fails; a full disk and the like
    are an `OSError` that names the file, whatever a library says of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # the umask's doing, and the folder's
        write(partial)
        partial.chmod(mode)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException as error:
        cause = _system_error(error, path)
        partial.unlink(missing_ok=True)
        if cause is None:
            raise
        raise cause from error
    return partial


def _system_error(error: BaseException, path: Path) -> OSError | None:
    """The system's error behind another one,
    which Rust's libraries tell by its number and torch not at all.
    """
    number = error.errno if isinstance(error, OSError) and error.filename is None else None
    if told := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(told[1])
    elif isinstance(error, RuntimeError) and shutil.disk_usage(path.parent).free < FULL:
        number = errno.ENOSPC
    return None if number is None else OSError(number, os.strerror(number), str(path))


def _partial(path: Path) -> Path:
    """A name beside `path` that file systems take too where the file's own is nearly as long as
    they allow.
    """
    name = os.fsencode(path.name)
    called = path.name if len(name) < 200 else hashlib.blake2b(name, digest_size=16).hexdigest()
    return path.with_name(f".{called}.{os.getpid()}.partial")


def replace_files(*files: tuple[Path, Write]) -> None:
    """Write each file beside its place, and move them there,
    in this order, once all of them are whole.
    """
    partials: list[tuple[Path, Path]] = []
    try:
        for path, write in files:
            partials.append((write_beside(path, write), path))
        for partial, path in partials:
            os.replace(partial, path)
        for folder in {path.parent for _, path in partials}:
            _sync(folder)
    finally:
        for partial, _ in partials:
            partial.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can:
    what was moved there is there after a power cut.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """One file of text in UTF-8."""
    replace_files((path, lambda partial: partial.write_text(text, encoding="utf-8")))


def sweep(folder: Path) -> None:
    """Remove what a process that was killed while writing has left in `folder`;
    nobody else may be writing there.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if PARTIAL.fullmatch(path.name):
                path.unlink(missing_ok=True)
