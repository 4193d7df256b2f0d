"""What a verb leaves on disk, and the promise that it writes over nothing that it did not make.

A folder that is written to holds `.detrellis.jsonl`, a line for each file that a verb made there:
its name, and the SHA-256 of its content. The line is written before the file, so a crash leaves no
file that nobody knows. A file may be replaced while its content is one that its lines tell;
anything else, a picture of the user's or a result that was edited since, is refused before any
work. So is every input, also one that an earlier call made.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from detrellis.atomic import write_beside
from detrellis.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MADE = ".detrellis.jsonl"
LOCK = ".detrellis.lock"  # says who writes to the folder (`folders.py`)
LARGEST = 65500  # pixels of a JPEG's side
ANY = "any"  # in place of a hash: the file grows, and is ours whatever is in it


class Outputs:
    """The files that a call makes below `folder`;
    `option` is what messages call the flag that names it.
    """

    def __init__(self, folder: str | Path, option: str = "--out") -> None:
        self.folder, self.option = Path(folder), option
        self._made: dict[str, set[str]] | None = None

    def ready(self, names: Iterable[str], inputs: Iterable[str | Path] = ()) -> None:
        """Checks, before any work, that each of `names` may be written. `inputs` are files, and
        folders of which everything is one. Nothing is made yet.

        Raises `UserError` naming the first that is an input, or is there and not as Detrellis left
        it; and where the folder cannot be written.
        """
        protected = {Path(os.path.realpath(path)) for path in inputs}
        for path in map(self._path, names):
            real = Path(os.path.realpath(path))
            if protected.intersection((real, *real.parents)):
                raise self._refusal(path, "an input, which would be overwritten")
            if os.path.lexists(path) and not self._replaceable(path):
                raise self._refusal(path, self._why_not(path))
        self._may_be_made()

    def alone(self, inputs: Iterable[str | Path] = ()) -> None:
        """Checks that nothing is in the folder but files as Detrellis left them, and no input.

        For what is read as a whole: any other file would be taken for a part of it. Raises
        `UserError` as `ready`.
        """
        names = [path.relative_to(self.folder).as_posix() for path in self._files()]
        self.ready(names, inputs)

    def clear(self) -> None:
        """Removes the files of an earlier call, which `alone` has checked:
        they would mix with those of this one.
        """
        for path in self._files():
            path.unlink()

    def take(self, names: Iterable[str]) -> None:
        """Calls files, or folders, ours from now on whatever is in them: a log that grows."""
        for name in names:
            self._note(name, ANY)

    def write(self, name: str, content: bytes | str) -> Path:
        """Writes `folder/name` whole: readers see the old file or the new one, never a part. A file
        of somebody else's that came since `ready` is refused too."""
        data = content.encode() if isinstance(content, str) else content
        return self.write_with(name, lambda partial: partial.write_bytes(data))

    def write_with(self, name: str, write: Callable[[Path], object]) -> Path:
        """As the method `write`, with the content that the function `write` puts into the path that
        it is given.
        """
        path = self._path(name)
        partial = write_beside(path, write)
        try:
            replaceable = os.path.lexists(path) and self._replaceable(path)
            self._note(name, digest(partial))
            if replaceable:
                partial.replace(path)
            else:
                _put(partial, path)
        except FileExistsError:
            raise self._refusal(path, "is there already, and Detrellis did not write it") from None
        finally:
            partial.unlink(missing_ok=True)
        return path

    @contextlib.contextmanager
    def growing(self, name: str) -> Iterator[Path]:
        """A path for a file that the block writes bit by bit. What it has written becomes
        `folder/name` at the block's end, also where that is an exception or Ctrl-C."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".growing.{os.getpid()}.partial")
        try:
            yield partial
        finally:
            if partial.exists():
                self.write_with(name, partial.replace)

    def note(self) -> None:
        """Calls all that is in the folder ours, as it is now:
        for files that a library has written there.
        """
        for path in self._files():
            self._note(path.relative_to(self.folder).as_posix(), digest(path))

    def made(self, path: Path) -> bool:
        """Whether an earlier call left this file, as it is, in the folder."""
        real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(self.folder))
        return real.is_relative_to(folder) and self._replaceable(
            self.folder / real.relative_to(folder)
        )

    def _path(self, name: str) -> Path:
        """Where the file of this name goes, which never leads out of the folder:
        a data set's words may be in it.
        """
        parts = PurePath(name)
        leads_out = parts.is_absolute() or ".." in parts.parts
        assert not leads_out, f"{name!r} leads out of {self.folder}"
        return self.folder / parts

    def _files(self) -> list[Path]:
        """All files below the folder."""
        return sorted(
            Path(parent, f)
            for parent, _, files in os.walk(self.folder)
            for f in files
            if f not in (MADE, LOCK)
        )

    def _replaceable(self, path: Path) -> bool:
        """Whether nothing is lost with it: it is as a call left it."""
        known = self._known().get(path.relative_to(self.folder).as_posix(), set())
        if ANY in known:
            return True
        return bool(known) and not path.is_symlink() and path.is_file() and digest(path) in known

    def _why_not(self, path: Path) -> str:
        if path.relative_to(self.folder).as_posix() in self._known():
            return "has been changed since Detrellis wrote it, and would be overwritten"
        return "is there already, and Detrellis did not write it"

    def _known(self) -> dict[str, set[str]]:
        """Hashes by name."""
        if self._made is None:
            self._made = _read(self.folder / MADE)
        return self._made

    def _note(self, name: str, content: str) -> None:
        known = self._known().setdefault(name, set())
        if content in known:
            return
        known.add(content)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / MADE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, "sha256": content}) + "\n")

    def _may_be_made(self) -> None:
        """`UserError` where the folder,
        or the nearest one above it that exists, is none or cannot be written.
        """
        folder = self.folder.absolute()
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        if not existing.is_dir():
            raise UserError(f"{existing}: a file, not a folder", f"Take another {self.option}.")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(
                f"{existing}: this folder cannot be written", f"Take another {self.option}."
            )

    def _refusal(self, path: Path, why: str) -> UserError:
        return UserError(f"{path}: {why}", f"Take another {self.option}, or move the file.")


def jpeg(image: Image) -> bytes:
    """The picture as the content of a JPEG file;
    one that is too large for the format is made smaller.
    """
    content = io.BytesIO()
    image.thumbnail((LARGEST, LARGEST))
    image.save(content, format="JPEG", quality=92)
    return content.getvalue()


def _put(partial: Path, path: Path) -> None:
    """Give the file the name `path`;
    `FileExistsError` where something has it, which a rename would replace.
    """
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("xb") as file:
            file.write(partial.read_bytes())


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, set[str]]:
    """The hashes of a file of notes, by name; none where there is no such file."""
    lines: list[str] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    hashes: dict[str, set[str]] = {}
    for line in lines:
        for name, content in _entry(line).items():
            hashes.setdefault(name, set()).add(content)
    return hashes


def _entry(line: str) -> dict[str, str]:
    """{name: hash} of a line; nothing for one that a crash has cut off."""
    try:
        entry = json.loads(line)
        return {str(entry["file"]): str(entry["sha256"])}
    except (ValueError, KeyError, TypeError):
        return {}
