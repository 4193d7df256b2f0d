"""The doctor checks the image files: whether they are there, and in the full check every pixel.

The fast part asks the file system only. `ImageFacts` keep what comparing splits needs, so that
nothing is read twice.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detrellis.data import jpeg
from detrellis.data.decode import (
    JPEGS,
    UPRIGHT,
    Header,
    absence,
    read_header,
    read_pixels,
    turn,
    upright_size,
)
from detrellis.data.files import is_image, map_threads, unread_twin
from detrellis.data.findings import Finding, finding
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


class FileStat(NamedTuple):
    """What the file system says of an image file."""

    bytes: int  # -1: no file
    key: tuple[int, int] | None  # the same for two names of one file
    absence: str = ""  # why there is no file

    @property
    def exists(self) -> bool:
        """Whether there is something to decode."""
        return self.bytes > 0


class Decoded(NamedTuple):
    """What decoding says of an image file."""

    digest: bytes  # of the file's bytes
    header: Header | None
    error: str  # why it cannot be decoded; "" where it can
    brightest: int  # largest value of a 16-bit picture after conversion, 255 for others
    doubt: str = ""  # what is odd about a JPEG's data


@dataclass(frozen=True)
class ImageFacts:
    """What is known of the files of all `I` images of one split."""

    stats: list[FileStat]
    # None after a fast check, and for files that are not there
    decoded: list[Decoded | None] | None


def gather(raw: RawDataset, *, fast: bool, progress: bool, workers: int | None) -> ImageFacts:
    """Asks the file system about every image and,
    unless `fast`, decodes it with `workers` threads.
    """
    stats = map_threads(_stat, [raw.path(row) for row in range(len(raw))], WAITING)
    if fast:
        return ImageFacts(stats, None)
    existing = [row for row, stat in enumerate(stats) if stat.exists]
    sizes = raw.sizes.tolist()
    jobs = [(raw.path(row), (sizes[row][0], sizes[row][1])) for row in existing]
    results = map_threads(_decode, jobs, workers, f"{raw.split} images" if progress else "")
    decoded: list[Decoded | None] = [None] * len(raw)
    for row, result in zip(existing, results, strict=True):
        decoded[row] = result
    return ImageFacts(stats, decoded)


def _stat(path: Path) -> FileStat:
    if why := absence(path):
        return FileStat(-1, None, why)
    stat = path.stat()
    return FileStat(stat.st_size, (stat.st_dev, stat.st_ino) if stat.st_ino else None)


def _decode(job: tuple[Path, tuple[int, int]]) -> Decoded:
    path, size = job
    digest, header = b"", None
    try:
        data = path.read_bytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        header = read_header(path)
        pixels = read_pixels(path, size)
    except UserError as error:
        return Decoded(digest, header, error.message.removeprefix(f"{path}: "), 255)
    except OSError as error:
        return Decoded(digest, header, f"cannot be read ({error.strerror})", 255)
    brightest = int(pixels.max()) if header.mode.startswith("I") else 255
    return Decoded(
        digest, header, "", brightest, jpeg.doubt(data) if header.format in JPEGS else ""
    )


def check_images(raw: RawDataset, facts: ImageFacts) -> list[Finding]:
    """Everything about the image list and the files of one split."""
    findings = [*_absent(raw, facts.stats), *_listed_twice(raw, facts.stats), *_without_boxes(raw)]
    if facts.decoded is None:
        return [*findings, *_without_size(raw, facts.stats)]
    for row, decoded in enumerate(facts.decoded):
        if decoded is not None:
            findings += _of_image(raw, row, decoded)
    return [*findings, *_same_content(raw, facts)]


def _at(
    raw: RawDataset,
    code: str,
    row: int,
    what: str,
    *,
    other: int | None = None,
    remedy: str | None = None,
) -> Finding:
    return finding(
        code,
        raw.split,
        raw.path(row),
        what,
        id=raw.image_id(row),
        row=row,
        other=other,
        remedy=remedy,
    )


def _absent(raw: RawDataset, stats: Sequence[FileStat]) -> Iterator[Finding]:
    missing = [row for row, stat in enumerate(stats) if stat.bytes < 0]
    remedy = None
    if missing and len(missing) == len(raw):
        remedy = f"None of the {len(raw)} images is below {raw.root}: correct the image folder."
    by_lower_name = _by_lower_name({raw.path(row).parent for row in missing})
    for row in missing:
        path, hint = raw.path(row), ""
        similar = by_lower_name.get((path.parent, path.stem.lower()))
        if similar is None and (unread := unread_twin(path)):
            hint = f"; there is {unread}, whose suffix is not read"
        elif similar not in (None, path.name):
            hint = f"; there is {similar}"
        yield _at(raw, "missing-image", row, stats[row].absence + hint, remedy=remedy)
    for row, stat in enumerate(stats):
        if stat.bytes == 0:
            yield _at(raw, "unreadable-image", row, "the file is empty (0 bytes)")


def _without_size(raw: RawDataset, stats: Sequence[FileStat]) -> Iterator[Finding]:
    """Images of which the reader already failed to learn the size."""
    for row in np.flatnonzero((raw.sizes <= 0).any(axis=1)).tolist():
        path = raw.path(row)
        try:
            if stats[row].exists:
                read_header(path)
        except UserError as error:
            yield _at(raw, "unreadable-image", row, error.message.removeprefix(f"{path}: "))


def _by_lower_name(folders: Iterable[Path]) -> dict[tuple[Path, str], str]:
    """Files by name without case and suffix:
    a .JPG listed as .jpg is the commonest reason of all.
    """
    return {
        (folder, os.path.splitext(name)[0].lower()): name
        for folder in folders
        if folder.is_dir()
        for name in sorted(os.listdir(folder))
        if is_image(name)
    }


def _listed_twice(raw: RawDataset, stats: Sequence[FileStat]) -> Iterator[Finding]:
    reported: set[int] = set()
    for image_id, rows in _groups(raw.image_ids.tolist()).items():
        names = {raw.file_names[row] for row in rows}
        what = f"image id {image_id} is used {len(rows)} times, for {', '.join(sorted(names)[:3])}"
        # Of one file the first record is as good as the last; of two files nobody knows whose boxes
        # they are.
        for row in rows[1:] if len(names) == 1 else rows:
            reported.add(row)
            yield _at(raw, "duplicate-image-id", row, what)
    for first, *others in _groups([stat.key for stat in stats]).values():
        for row in (row for row in others if row not in reported):
            what = (
                f"the file is listed again: image {_id_or_name(raw, first)} and image "
                f"{_id_or_name(raw, row)}"
            )
            yield _at(raw, "duplicate-file", row, what, other=first)


def _id_or_name(raw: RawDataset, row: int) -> str:
    image_id = raw.image_id(row)
    return raw.file_names[row] if image_id is None else str(image_id)


def _groups(keys: Sequence[object]) -> dict[object, list[int]]:
    """Rows of every key that occurs more than once; None is no key."""
    rows: dict[object, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        if key is not None:
            rows[key].append(row)
    return {key: group for key, group in rows.items() if len(group) > 1}


def _without_boxes(raw: RawDataset) -> Iterator[Finding]:
    counts = np.bincount(raw.box_rows[raw.box_rows >= 0], minlength=len(raw))
    empty = np.flatnonzero(counts == 0)
    if len(empty) and len(empty) < len(raw):
        what = (
            f"{len(empty)} of {len(raw)} images have no boxes; the first: "
            f"{raw.file_names[int(empty[0])]}"
        )
        yield finding("images-without-boxes", raw.split, raw.source, what, count=len(empty))


def _of_image(raw: RawDataset, row: int, decoded: Decoded) -> Iterator[Finding]:
    """Everything about one image that was decoded, or could not be."""
    if decoded.error or decoded.header is None:
        yield _at(raw, "unreadable-image", row, decoded.error)
        return
    header, listed = decoded.header, (int(raw.sizes[row, 0]), int(raw.sizes[row, 1]))
    size = upright_size(header, listed)
    if min(listed) > 0 and size != listed:
        what = (
            f"the file is {size[1]}x{size[0]} (width x height), the annotations say "
            f"{listed[1]}x{listed[0]}"
        )
        yield _at(raw, "wrong-size", row, what)
    if header.orientation in UPRIGHT:
        yield _orientation(raw, row, header, listed)
    if header.mode not in PLAIN:
        how = TREATMENT.get(header.mode, "converted to RGB")
        yield _at(raw, "unusual-mode", row, f"a {header.format} of mode {header.mode}: {how}")
    if header.several:
        yield _at(
            raw,
            "several-pictures",
            row,
            f"a {header.format} of several pictures: the first is used",
        )
    if decoded.doubt:
        yield _at(raw, "doubtful-jpeg", row, decoded.doubt)
    if decoded.brightest < DARK:
        yield _at(
            raw,
            "dark-16-bit",
            row,
            f"its 16-bit values become 0 to {decoded.brightest} of 255: nearly black",
        )


def _orientation(raw: RawDataset, row: int, header: Header, listed: tuple[int, int]) -> Finding:
    quarter = header.orientation >= 5 and header.size[0] != header.size[1]
    if not quarter:
        what = (
            f"EXIF orientation {header.orientation} is applied, but the size cannot tell whether "
            "the boxes mean that"
        )
        return _at(raw, "exif-ambiguous", row, what)
    applied = turn(header, listed) != 1
    frame = (
        "upright frame, so it is applied" if applied else "frame as stored, so it is not applied"
    )
    return _at(
        raw,
        "exif-rotated",
        row,
        f"EXIF orientation {header.orientation}: the annotations are in the {frame}",
    )


def _same_content(raw: RawDataset, facts: ImageFacts) -> Iterator[Finding]:
    digests = [(decoded.digest or None) if decoded else None for decoded in facts.decoded or ()]
    for first, *others in _groups(digests).values():
        for row in others:
            if facts.stats[row].key != facts.stats[first].key:
                yield _at(
                    raw,
                    "same-content",
                    row,
                    f"the same bytes as {raw.file_names[first]}",
                    other=first,
                )


def shared_images(raws: Mapping[str, RawDataset], facts: Mapping[str, ImageFacts]) -> list[Finding]:
    """Images that stand in two splits: the same file, or one with the same content.

    Without a full check contents are compared only where name and length agree.
    """
    findings: list[Finding] = []
    for earlier, later in combinations(raws, 2):
        findings += _in_both(raws[earlier], raws[later], facts[earlier], facts[later])
    return findings


def _in_both(
    a: RawDataset, b: RawDataset, a_facts: ImageFacts, b_facts: ImageFacts
) -> Iterator[Finding]:
    a_keys, b_keys = _identities(a, a_facts), _identities(b, b_facts)
    b_rows = {key: row for row, keys in enumerate(b_keys) for key in keys}
    for row, keys in enumerate(a_keys):
        candidates = (b_rows[key] for key in keys if key in b_rows)
        twin = next(
            (each for each in candidates if _same_image(a, row, a_facts, b, each, b_facts)), None
        )
        if twin is not None:
            yield _at(a, "shared-image", row, f"the same image is in {b.split}: {b.path(twin)}")


def _identities(raw: RawDataset, facts: ImageFacts) -> list[list[object]]:
    """What two records of one image have in common: the file, its content, or name and length."""
    identities: list[list[object]] = []
    for row, stat in enumerate(facts.stats):
        decoded = facts.decoded[row] if facts.decoded is not None else None
        content = (
            decoded.digest if decoded is not None else (Path(raw.file_names[row]).name, stat.bytes)
        )
        identities.append([key for key in (stat.key, content) if key] if stat.exists else [])
    return identities


def _same_image(
    a: RawDataset, row: int, a_facts: ImageFacts, b: RawDataset, twin: int, b_facts: ImageFacts
) -> bool:
    if a_facts.decoded is not None or a_facts.stats[row].key == b_facts.stats[twin].key:
        return True
    try:
        return a.path(row).read_bytes() == b.path(twin).read_bytes()
    except OSError:
        return False
