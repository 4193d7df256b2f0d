"""Looking at many files at once.

In threads, not processes: decoding, hashing and waiting for a disk all let the other threads go on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from detrellis.data.decode import read_header, upright_size
from detrellis.errors import UserError

NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})  # Pillow knows them, but decodes none
HIDDEN = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})  # what file systems and archives leave behind
NOTES = frozenset({"", ".csv", ".json", ".npy", ".txt", ".xml", ".yaml", ".yml"})  # suffixes beside images, no images
CHUNK = 32  # items a task: a future for each of 100,000 images would cost more than it brings

Item = TypeVar("Item")
Result = TypeVar("Result")


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_threads(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None, progress: str = ""
) -> list[Result]:
    """`function` of every item, in order; `progress` is the bar's title, and none is shown without one."""
    if workers is not None and workers < 1:
        raise UserError(f"workers = {workers}", "Give a number of threads, 1 or more.")
    chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
    pool = ThreadPoolExecutor(max(1, workers or cpus()))
    try:
        done = pool.map(lambda chunk: [function(item) for item in chunk], chunks)
        return [result for results in _shown(done, len(items), progress) for result in results]
    finally:
        pool.shutdown(cancel_futures=True)  # whoever presses Ctrl-C does not wait for the other 100,000


def _shown(chunks: Iterable[list[Result]], total: int, title: str) -> Iterable[list[Result]]:
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
    """(I, 2) height and width of the images as viewers show them; 0, 0 where a file is missing or no image."""
    return np.array(map_threads(_size, paths), dtype=np.int64).reshape(-1, 2)


def _size(path: Path) -> tuple[int, int]:
    try:
        return upright_size(read_header(path))
    except UserError:
        return 0, 0


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of what Pillow decodes; a plugin that registers itself with Pillow adds its own."""
    from PIL import Image  # only now: asking it imports the plugins of all formats

    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in Image.OPEN and name not in NO_PICTURES)


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is never part of a data set: `._x.jpg`, `.DS_Store`, `__MACOSX`."""
    return name.startswith(".") or name in HIDDEN


def is_image(path: str | Path) -> bool:
    """Whether it is called like an image that can be read, and is not hidden."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in image_suffixes() and not hidden(name)


def unread_twin(image: Path) -> str | None:
    """A file called like `image`, which is missing, with a suffix that is not read: p0.heic for p0.jpg.

    Files of annotations are called so too, and are none.
    """
    try:
        names = sorted(os.listdir(image.parent))
    except (OSError, ValueError):
        return None
    twins = (n for n in names if os.path.splitext(n)[0].lower() == image.stem.lower() and not hidden(n))
    return next((n for n in twins if not is_image(n) and Path(n).suffix.lower() not in NOTES), None)


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for `root` and all below it, hidden ones left out, links followed once."""
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
    """The files in `folder` itself with one of the suffixes, in any case, sorted; hidden ones are left out."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    found = (name for name in names if os.path.splitext(name)[1].lower() in suffixes and not hidden(name))
    return [file for name in found if (file := folder / name).is_file()]


def list_images(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted, links followed."""
    return sorted(Path(parent, name) for parent, files in walk(folder) for name in files if is_image(name))


def subfolders(root: Path, depth: int) -> list[Path]:
    """Folders below `root`, nearest first, hidden ones left out; at most 200, for a home folder given by mistake."""
    found: list[Path] = []
    level = [root]
    for _ in range(depth):
        level = [folder for parent in level for folder in _folders(parent)][: 200 - len(found)]
        found += level
    return found


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:  # which knows what is a folder without asking for each file
            return sorted(Path(e.path) for e in entries if e.is_dir() and not hidden(e.name))
    except OSError:
        return []


def common_root(paths: Sequence[Path], default: Path) -> Path:
    """The deepest folder that holds all of them."""
    return Path(os.path.commonpath([p.parent for p in paths])) if paths else default


def read_text(path: Path) -> str:
    """A text file's content, in UTF-8, UTF-16 or UTF-32; `UserError` where it cannot be read."""
    try:
        data = path.read_bytes()
        return data.decode(json.detect_encoding(data[:4])).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "Check the path and its permissions.") from error
