"""The doctor looks at the image files: whether they are there, and in the full check at every pixel.

The fast part asks the file system only. `Facts` keep what comparing splits needs, so that nothing is read twice.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detrellis.data import jpeg
from detrellis.data.decode import JPEGS, UPRIGHT, Header, absence, read_header, read_pixels, turn, upright_size
from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.files import is_image, map_threads, unread_twin
from detrellis.data.records import RawDataset
from detrellis.errors import UserError

WAITING = 16  # threads that ask a (perhaps remote) file system
DARK = 16  # of 255: a 16-bit picture below this uses 12 bits or fewer

PLAIN = ("RGB", "")  # modes not worth a word
TREATMENT = {
    "I;16": "the upper 8 of 16 bits are kept",
    "I;16B": "the upper 8 of 16 bits are kept",
    "I": "the upper 8 of 16 bits are kept",
    "RGBA": "transparency is laid over white",
    "LA": "transparency is laid over white",
    "PA": "transparency is laid over white",
}


class Stat(NamedTuple):
    """What the file system says."""

    bytes: int  # -1: no file
    key: tuple[int, int] | None  # the same for two names of one file
    absence: str = ""  # why there is no file

    @property
    def there(self) -> bool:
        """Whether there is something to decode."""
        return self.bytes > 0


class Look(NamedTuple):
    """What decoding says."""

    digest: bytes  # of the file's bytes
    header: Header | None
    error: str  # why it cannot be decoded; "" where it can
    brightest: int  # largest value of a 16-bit picture after conversion, 255 for others
    doubt: str = ""  # what is odd about a JPEG's data


@dataclass(frozen=True)
class Facts:
    """All images of one split; `looks` only after a full check, None for those that are not there."""

    stats: list[Stat]
    looks: list[Look | None] | None


def gather(raw: RawDataset, *, fast: bool, progress: bool, workers: int | None) -> Facts:
    """Asks the file system about every image and, unless `fast`, decodes it."""
    stats = map_threads(_stat, [raw.path(row) for row in range(len(raw))], WAITING)
    if fast:
        return Facts(stats, None)
    there = [row for row, stat in enumerate(stats) if stat.there]
    sizes = raw.sizes.tolist()
    jobs = [(raw.path(row), (sizes[row][0], sizes[row][1])) for row in there]
    looks: list[Look | None] = [None] * len(raw)
    for row, look in zip(
        there, map_threads(_look, jobs, workers, f"{raw.split} images" if progress else ""), strict=True
    ):
        looks[row] = look
    return Facts(stats, looks)


def _stat(path: Path) -> Stat:
    if why := absence(path):
        return Stat(-1, None, why)
    found = path.stat()
    return Stat(found.st_size, (found.st_dev, found.st_ino) if found.st_ino else None)


def _look(job: tuple[Path, tuple[int, int]]) -> Look:
    path, size = job
    digest, header = b"", None
    try:
        data = path.read_bytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        header = read_header(path)
        pixels = read_pixels(path, size)
    except UserError as error:
        return Look(digest, header, error.message.removeprefix(f"{path}: "), 255)
    except OSError as error:
        return Look(digest, header, f"cannot be read ({error.strerror})", 255)
    brightest = int(pixels.max()) if header.mode.startswith("I") else 255
    return Look(digest, header, "", brightest, jpeg.doubt(data) if header.format in JPEGS else "")


def check_images(raw: RawDataset, facts: Facts) -> list[Finding]:
    """Everything about the image list and the files of one split."""
    found = [*_absent(raw, facts.stats), *_listed_twice(raw, facts.stats), *_without_boxes(raw)]
    for row, look in enumerate(facts.looks or ()):
        if look is not None:
            found += _seen(raw, row, look)
    if facts.looks is not None:
        found += _same_content(raw, facts)
    else:
        found += _unopened(raw, facts.stats)
    return found


def _at(
    raw: RawDataset, code: str, row: int, what: str, *, other: int | None = None, remedy: str | None = None
) -> Finding:
    own = raw.image_id(row)
    return finding(code, raw.split, raw.path(row), what, id=own, row=row, other=other, remedy=remedy)


def _absent(raw: RawDataset, stats: Sequence[Stat]) -> Iterator[Finding]:
    missing = [row for row, stat in enumerate(stats) if stat.bytes < 0]
    remedy = None
    if missing and len(missing) == len(raw):
        remedy = f"None of the {len(raw)} images is below {raw.root}: correct the image folder."
    nearly = _by_lower_name({raw.path(row).parent for row in missing})
    for row in missing:
        path = raw.path(row)
        similar = nearly.get((path.parent, path.stem.lower()))
        unread = unread_twin(path) if similar is None else None
        hint = f"; there is {unread}, whose suffix is not read" if unread else ""
        what = stats[row].absence + (f"; there is {similar}" if similar not in (None, path.name) else hint)
        yield _at(raw, "missing-image", row, what, remedy=remedy)
    for row, stat in enumerate(stats):
        if stat.bytes == 0:
            yield _at(raw, "unreadable-image", row, "the file is empty (0 bytes)")


def _unopened(raw: RawDataset, stats: Sequence[Stat]) -> Iterator[Finding]:
    """Images of which the reader already failed to learn the size."""
    for row in np.flatnonzero((raw.sizes <= 0).any(axis=1)).tolist():
        if stats[row].there:
            yield from _seen(raw, row, Look(b"", None, _opening(raw.path(row)), 255))


def _opening(path: Path) -> str:
    try:
        read_header(path)
    except UserError as error:
        return error.message.removeprefix(f"{path}: ")
    return ""


def _by_lower_name(folders: Iterable[Path]) -> dict[tuple[Path, str], str]:
    """Files by name without case and suffix: a .JPG listed as .jpg is the commonest reason of all."""
    return {
        (folder, os.path.splitext(name)[0].lower()): name
        for folder in folders
        if folder.is_dir()
        for name in sorted(os.listdir(folder))
        if is_image(name)
    }


def _listed_twice(raw: RawDataset, stats: Sequence[Stat]) -> Iterator[Finding]:
    told: set[int] = set()
    for own, rows in _groups(raw.image_ids.tolist()).items():
        names = {raw.file_names[row] for row in rows}
        # Of one file the first record is as good as the last; of two files nobody knows whose boxes they are.
        for row in rows[1:] if len(names) == 1 else rows:
            told.add(row)
            what = f"image id {own} is used {len(rows)} times, for {', '.join(sorted(names)[:3])}"
            yield _at(raw, "duplicate-image-id", row, what)
    for first, *others in _groups([stat.key for stat in stats]).values():
        for row in others:
            if row not in told:
                what = f"the file is listed again: image {_who(raw, first)} and image {_who(raw, row)}"
                yield _at(raw, "duplicate-file", row, what, other=first)


def _who(raw: RawDataset, row: int) -> str:
    own = raw.image_id(row)
    return raw.file_names[row] if own is None else str(own)


def _groups(keys: Sequence[object]) -> dict[object, list[int]]:
    """Rows of every key that occurs more than once; None is no key."""
    rows: dict[object, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        if key is not None:
            rows[key].append(row)
    return {key: found for key, found in rows.items() if len(found) > 1}


def _without_boxes(raw: RawDataset) -> Iterator[Finding]:
    counts = np.bincount(raw.box_rows[raw.box_rows >= 0], minlength=len(raw))
    empty = np.flatnonzero(counts == 0)
    if len(empty) and len(empty) < len(raw):
        what = f"{len(empty)} of {len(raw)} images have no boxes; the first: {raw.file_names[int(empty[0])]}"
        yield finding("images-without-boxes", raw.split, raw.source, what, count=len(empty))


def _seen(raw: RawDataset, row: int, look: Look) -> Iterator[Finding]:
    if look.error:
        yield _at(raw, "unreadable-image", row, look.error)
    if look.error or look.header is None:
        return
    header, listed = look.header, (int(raw.sizes[row, 0]), int(raw.sizes[row, 1]))
    found = upright_size(header, listed)
    if min(listed) > 0 and found != listed:
        what = f"the file is {found[1]}x{found[0]} (width x height), the annotations say {listed[1]}x{listed[0]}"
        yield _at(raw, "wrong-size", row, what)
    if header.orientation in UPRIGHT:
        yield _orientation(raw, row, header, listed)
    if header.mode not in PLAIN:
        how = TREATMENT.get(header.mode, "converted to RGB")
        yield _at(raw, "unusual-mode", row, f"a {header.format} of mode {header.mode}: {how}")
    if header.several:
        yield _at(raw, "several-pictures", row, f"a {header.format} of several pictures: the first is used")
    if look.doubt:
        yield _at(raw, "doubtful-jpeg", row, look.doubt)
    if look.brightest < DARK:
        yield _at(raw, "dark-16-bit", row, f"its 16-bit values become 0 to {look.brightest} of 255: nearly black")


def _orientation(raw: RawDataset, row: int, header: Header, listed: tuple[int, int]) -> Finding:
    quarter = header.orientation >= 5 and header.size[0] != header.size[1]
    if not quarter:
        what = f"EXIF orientation {header.orientation} is applied, but the size cannot tell whether the boxes mean that"
        return _at(raw, "exif-ambiguous", row, what)
    applied = turn(header, listed) != 1
    frame = "upright frame, so it is applied" if applied else "frame as stored, so it is not applied"
    return _at(raw, "exif-rotated", row, f"EXIF orientation {header.orientation}: the annotations are in the {frame}")


def _same_content(raw: RawDataset, facts: Facts) -> Iterator[Finding]:
    digests = [look.digest or None if look else None for look in facts.looks or ()]
    for first, *others in _groups(digests).values():
        for row in others:
            if facts.stats[row].key != facts.stats[first].key:
                yield _at(raw, "same-content", row, f"the same bytes as {raw.file_names[first]}", other=first)


def shared_images(raws: Mapping[str, RawDataset], facts: Mapping[str, Facts]) -> list[Finding]:
    """Images that stand in two splits: the same file, or one with the same content.

    Without a full check contents are compared only where name and length agree.
    """
    found: list[Finding] = []
    names = list(raws)
    for place, earlier in enumerate(names):
        for later in names[place + 1 :]:
            found += _shared(raws[earlier], raws[later], facts[earlier], facts[later])
    return found


def _shared(a: RawDataset, b: RawDataset, a_facts: Facts, b_facts: Facts) -> Iterator[Finding]:
    a_keys, b_keys = _identities(a, a_facts), _identities(b, b_facts)
    there = {key: row for row, keys in enumerate(b_keys) for key in keys}
    for row, keys in enumerate(a_keys):
        twins = (there[key] for key in keys if key in there)
        twin = next((t for t in twins if _alike(a, row, a_facts, b, t, b_facts)), None)
        if twin is not None:
            yield _at(a, "shared-image", row, f"the same image is in {b.split}: {b.path(twin)}")


def _identities(raw: RawDataset, facts: Facts) -> list[list[object]]:
    """What two records of one image have in common: the file, its content, or name and length."""
    found: list[list[object]] = []
    for row, stat in enumerate(facts.stats):
        look = facts.looks[row] if facts.looks is not None else None
        content = look.digest if look is not None else (Path(raw.file_names[row]).name, stat.bytes)
        found.append([key for key in (stat.key, content) if key] if stat.there else [])
    return found


def _alike(a: RawDataset, row: int, a_facts: Facts, b: RawDataset, twin: int, b_facts: Facts) -> bool:
    if a_facts.looks is not None or a_facts.stats[row].key == b_facts.stats[twin].key:
        return True
    try:
        return a.path(row).read_bytes() == b.path(twin).read_bytes()
    except OSError:
        return False
