"""Folders and files: listing them, looking at many at once, and reading text and JSON.

Many files are looked at in threads, not processes: decoding, hashing and waiting for a disk all let
the other threads go on.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from detrellis.data.decode import absence, read_header, upright_size
from detrellis.errors import UserError

# Pillow knows them, but decodes none
NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
# What file systems and archives leave behind
HIDDEN = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
# Suffixes beside images, no images
NOTES = frozenset({"", ".csv", ".json", ".npy", ".txt", ".xml", ".yaml", ".yml"})
MAX_FOLDERS = 200  # below a folder: a home folder may be given by mistake
AGAIN = "Export the annotations again"  # how to get another copy of a broken file
CHUNK = 32  # items a task: a future for each of 100,000 images would cost more than it brings

Item = TypeVar("Item")
Result = TypeVar("Result")


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | None = None,
    progress: str = "",
) -> list[Result]:
    """`function` of every item, in order, by `workers` threads (default: one a core).

    `progress` is the title of a progress bar on stderr; without one no bar is shown. Raises
    `UserError` where `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers = {workers}", "Give a number of threads, 1 or more.")
    chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
    pool = ThreadPoolExecutor(max(1, workers or cpus()))
    try:
        done = pool.map(lambda chunk: [function(item) for item in chunk], chunks)
        return list(chain.from_iterable(_with_progress(done, len(items), progress)))
    finally:
        # Whoever presses Ctrl-C does not wait for the other 100,000
        pool.shutdown(cancel_futures=True)


def _with_progress(
    chunks: Iterable[list[Result]], total: int, title: str
) -> Iterator[list[Result]]:
    """The chunks, counted by a progress bar of that title."""
    if not title:
        yield from chunks
        return
    # Only who wants to see a bar pays for importing one.
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
    times = (rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn())
    with rich.Progress(*columns, *times, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        for chunk in chunks:
            yield chunk
            bar.advance(task, len(chunk))


def read_sizes(paths: Sequence[Path]) -> NDArray[np.int64]:
    """`(I, 2)` height and width of the images as viewers show them;
    0, 0 where a file is missing or no image.
    """
    return np.array(map_threads(_size, paths), dtype=np.int64).reshape(-1, 2)


def _size(path: Path) -> tuple[int, int]:
    try:
        return upright_size(read_header(path))
    except UserError:
        return 0, 0


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of what Pillow decodes;
    a plugin that registers itself with Pillow adds its own.
    """
    from PIL import Image  # only now: asking it imports the plugins of all formats

    known = Image.registered_extensions().items()
    read = {*Image.OPEN, "MPO"} - {*NO_PICTURES}  # an MPO is opened as the JPEG that it begins with
    return frozenset(suffix for suffix, name in known if name in read)


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is never part of a data set:
    `._x.jpg`, `.DS_Store`, `__MACOSX`.
    """
    return name.startswith(".") or name in HIDDEN


def is_image(path: str | Path) -> bool:
    """Whether it is called like an image that can be read, and is not hidden."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in image_suffixes() and not hidden(name)


def unread_twin(image: Path) -> str | None:
    """A file called like `image`, which is missing, with a suffix that is not read:
    p0.heic for p0.jpg.

    Files of annotations are called so too, and are none.
    """
    try:
        names = sorted(os.listdir(image.parent))
    except (OSError, ValueError):
        return None
    twins = (
        n for n in names if os.path.splitext(n)[0].lower() == image.stem.lower() and not hidden(n)
    )
    return next((n for n in twins if not is_image(n) and Path(n).suffix.lower() not in NOTES), None)


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for `root` and all below it,
    hidden ones left out, links followed once.
    """
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        here = os.stat(parent)
        if here.st_ino and (here.st_dev, here.st_ino) in seen:
            folders.clear()  # a link that leads back
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not hidden(name))
        yield parent, [name for name in files if not hidden(name)]


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """The files in `folder` itself with one of the suffixes, in any case, sorted;
    hidden ones are left out.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    fitting = (
        name for name in names if os.path.splitext(name)[1].lower() in suffixes and not hidden(name)
    )
    return [file for name in fitting if (file := folder / name).is_file()]


def files_below(folder: Path, suffix: str) -> list[Path]:
    """All files below `folder` whose name ends with `suffix`,
    in any case, sorted, links followed.
    """
    return sorted(
        Path(parent, name)
        for parent, names in walk(folder)
        for name in names
        if name.lower().endswith(suffix)
    )


def stem_below(folder: Path, file: Path) -> str:
    """The file's path from `folder` on,
    without its suffix and with "/" between folders: "seq1/0001".
    """
    return file.relative_to(folder).with_suffix("").as_posix()


def below_common_folder(files: Collection[Path]) -> tuple[str, dict[Path, str]]:
    """The folder that all files are in, and the place of each below it;
    "" and the paths as they are where there is none, as on several drives.
    """
    try:
        folder = os.path.commonpath([file.parent for file in files])
    except ValueError:
        return "", {file: str(file) for file in files}
    return folder, {file: file.relative_to(folder).as_posix() for file in files}


def list_images(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted, links followed."""
    return sorted(
        Path(parent, name) for parent, files in walk(folder) for name in files if is_image(name)
    )


def subfolders(root: Path, depth: int) -> list[Path]:
    """Folders below `root`, nearest first, hidden ones left out; at most `MAX_FOLDERS`."""
    folders: list[Path] = []
    level = [root]
    for _ in range(depth):
        level = [folder for parent in level for folder in _folders(parent)][
            : MAX_FOLDERS - len(folders)
        ]
        folders += level
    return folders


def _folders(parent: Path) -> list[Path]:
    try:
        # Which knows what is a folder without asking for each file
        with os.scandir(parent) as entries:
            return sorted(Path(e.path) for e in entries if e.is_dir() and not hidden(e.name))
    except OSError:
        return []


def read_head(path: Path, size: int = 65536) -> str:
    """The first `size` bytes of a text file, odd letters replaced by a mark.
    `UserError` where it cannot be read.
    """
    return _decoded(read_bytes(path, size), errors="replace")


def read_text(path: Path) -> str:
    """A text file's content, in UTF-8, UTF-16 or UTF-32; `UserError` where it cannot be read."""
    try:
        return _decoded(read_bytes(path))
    except UnicodeDecodeError as error:
        what = f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})"
        raise UserError(what, "If it is text, save it in UTF-8.") from error


def read_bytes(path: Path, size: int = -1) -> bytes:
    """A file's content, or its first `size` bytes.
    `UserError` where it cannot be read, or is a pipe or a device: those may have no end."""
    remedy = "Check the path and its permissions."
    if why := absence(path):
        raise UserError(f"{path}: {why}", remedy)
    try:
        with path.open("rb") as stream:
            return stream.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", remedy) from error


def _decoded(data: bytes, errors: str = "strict") -> str:
    return data.decode(json.detect_encoding(data[:4]), errors).removeprefix("\ufeff")


def read_json(file: Path, shape: str = "", again: str = AGAIN) -> Any:
    """The value in a JSON file, in UTF-8, UTF-16 or UTF-32.

    Raises `UserError` with line and column where it is malformed; `shape` is what the remedy says
    of a right file, and `again` how to get another copy of it.
    """
    text = read_text(file)
    try:
        with not_collecting():
            return json.loads(text)
    except json.JSONDecodeError as error:
        raise _malformed_json(file, text, error, shape, again) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON file that can be read ({error})", shape) from error


def read_object(file: Path, shape: str = "", again: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file;
    raises `UserError` as `read_json`, and where the value is another one.
    """
    content = read_json(file, shape, again)
    if not isinstance(content, dict):
        raise UserError(
            f"{file}: the top level is {kind(content)}, not an object", shape or f"{again}."
        )
    return content


def kind(value: Any) -> str:
    """What a JSON value is, in a word."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
    }
    return "null" if value is None else kinds.get(type(value), "a number")


def _malformed_json(
    file: Path, text: str, error: json.JSONDecodeError, shape: str, again: str
) -> UserError:
    cut_off = f"{again}; a copy may have been cut off."
    if not text.strip():
        return UserError(f"{file}: the file is empty", cut_off)
    where = f"line {error.lineno}, column {error.colno}"
    rest = text[error.pos :].lstrip()
    if error.msg == "Extra data" and rest[:1] in ("{", "["):
        return UserError(
            f"{file}: several JSON values, the second in {where} (JSON Lines?)",
            f"Export one. {shape}".rstrip(),
        )
    what = f"{file}: malformed JSON ({error.msg}, {where})"
    if not rest:
        return UserError(what, cut_off)
    rules = "no comments, no comma behind the last entry, and \\\\ for a backslash"
    return UserError(
        what, f"Put this line right (JSON has {rules}), or {again[0].lower()}{again[1:]}."
    )


@contextmanager
def not_collecting() -> Iterator[None]:
    """No garbage collection: it would look at millions of small objects again and again,
    none of them garbage.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
