"""Files in the data set's folder that are not read: one finding, by suffix, so that nothing is left out unnoticed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from detrellis.data.files import walk
from detrellis.data.findings import Finding, finding
from detrellis.data.layout import DataSource
from detrellis.data.records import RawDataset
from detrellis.data.splits import SplitFiles

SHOWN = 8  # suffixes that the note names


def unused_files(source: DataSource, raws: Mapping[str, RawDataset]) -> list[Finding]:
    """The note `unused-files` about everything in the data set's folder that no split reads."""
    unused = _unused(source, raws)
    if not unused:
        return []
    kinds = sorted(unused.items(), key=lambda item: (-len(item[1]), item[0]))
    counts = [f"{len(files)} {suffix or 'without a suffix'} ({_first(files)})" for suffix, files in kinds[:SHOWN]]
    more = f" and {len(kinds) - SHOWN} more suffixes" if len(kinds) > SHOWN else ""
    count = sum(len(files) for files in unused.values())
    subject = "1 file in this folder is" if count == 1 else f"{count} files in this folder are"
    what = f"{subject} not used: {', '.join(counts)}{more}"
    return [finding("unused-files", "", str(source.folder), what, count=count)]


def unused_annotations(source: DataSource, raws: Mapping[str, RawDataset]) -> list[Finding]:
    """The warning `unused-annotations` where more annotation files are left out than read.

    Only where each image has a file of its own (YOLO, Pascal VOC, ...), and all splits are in `raws`.
    """
    labels = [file for raw in raws.values() for file in raw.label_files or () if os.path.isfile(file)]
    if not labels or set(raws) != set(source.splits):
        return []
    suffixes = {_suffix(file) for file in labels}
    unused = _unused(source, raws)
    alike = [file for suffix in sorted(suffixes) for file in unused.get(suffix, ())]
    if len(alike) <= len(set(labels)):
        return []
    what = f"{len(alike)} of {len(alike) + len(set(labels))} annotation files are not used: {_first(alike)}"
    return [finding("unused-annotations", "", str(source.folder), what, count=len(alike))]


def _unused(source: DataSource, raws: Mapping[str, RawDataset]) -> dict[str, list[str]]:
    """Files that are not read, relative to the folder, by suffix in lower case; none where no folder was given."""
    if source.folder is None:
        return {}
    real = cache(os.path.realpath)
    used: dict[str, set[str]] = defaultdict(set)
    for parent, name in map(os.path.split, _read(source.splits, raws)):
        used[real(parent)].add(name)
    unused: dict[str, list[str]] = defaultdict(list)
    for parent, names in walk(source.folder):
        below = Path(os.path.relpath(parent, source.folder))
        for name in sorted(set(names) - used.get(real(parent), set())):
            if not _links_to(os.path.join(parent, name), used):
                unused[_suffix(name)].append((below / name).as_posix())
    return unused


def _links_to(path: str, used: Mapping[str, set[str]]) -> bool:
    """Whether it is a link to a file that is read by its own name."""
    if not os.path.islink(path):
        return False
    parent, name = os.path.split(os.path.realpath(path))
    return name in used.get(parent, ())


def _read(splits: Mapping[str, SplitFiles], raws: Mapping[str, RawDataset]) -> Iterable[str]:
    """Every path that is read."""
    for files in splits.values():
        yield from (str(path) for path in (files.annotations, files.listing, *files.images) if path is not None)
    for raw in raws.values():
        root = str(raw.root)
        yield from (os.path.join(root, name) for name in raw.file_names)
        yield from raw.label_files or ()


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _first(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]}, ..."
