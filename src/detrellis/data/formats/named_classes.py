"""Sets that give their classes by name, a list of objects a picture: Pascal VOC, labelme, VIA and CSV.

The readers make `Record`s, and `dataset` makes columns of them. Class names in alphabetical order get the ids 1, 2,
...; names that only other splits have follow those of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.files import read_sizes
from detrellis.data.records import RawDataset, from_columns

Box = tuple[float, float, float, float]  # x, y, width, height in pixels; NaN where a number is missing


class Thing(NamedTuple):
    """One object."""

    name: str
    box: Box
    line: int  # its number in the file, or its line, from 1
    difficult: bool = False
    written: str = ""  # what stands where there are no four numbers


class Record(NamedTuple):
    """One picture."""

    file: Path  # that tells what it shows
    image: str  # relative to the root
    size: tuple[int, int]  # height, width; 0 where the annotations do not say
    things: Sequence[Thing]
    problem: str = ""  # why it is unknown what the picture shows; then there are no things
    line: int | None = None  # where the problem is


def class_names(records: Mapping[str, Sequence[Record]], wanted: Iterable[str]) -> dict[str, list[str]]:
    """The names of each wanted split in the order of their ids; `records` has training, where there is one."""
    names = {split: sorted({t.name for r in rows for t in r.things}) for split, rows in records.items()}
    return {split: list(dict.fromkeys([*names.get("train", ()), *names[split]])) for split in wanted}


def dataset(
    split: str,
    source: Path,
    root: Path,
    records: Sequence[Record],
    names: Sequence[str],
    findings: Sequence[Finding] = (),
    difficult: bool = False,
) -> RawDataset:
    """The split's columns. Missing sizes are read from the files; `difficult`: whether the format has such marks."""
    sizes = [r.size for r in records]
    absent = [row for row, size in enumerate(sizes) if min(size) <= 0]
    measured = read_sizes([root / records[row].image for row in absent]).tolist()
    for row, (height, width) in zip(absent, measured, strict=True):
        sizes[row] = height, width
    unsaid = sum(not records[row].problem for row in absent)
    said = list(findings)
    if unsaid:
        what = f"{unsaid} of {len(records)} pictures are annotated without height and width"
        said.append(finding("size-missing", split, source, what, count=unsaid))
    said += (
        finding(
            "unreadable-labels", split, r.file, f"{r.problem}: what {r.image} shows is unknown", line=r.line, row=row
        )
        for row, r in enumerate(records)
        if r.problem
    )
    ids = {name: i for i, name in enumerate(names, start=1)}
    head = {
        "split": split,
        "source": source,
        "root": root,
        "categories": tuple((i, name) for name, i in ids.items()),
        "label_files": tuple(str(r.file) for r in records),
        "findings": tuple(said),
        "difficult": np.array([t.difficult for r in records for t in r.things], dtype=np.bool_) if difficult else None,
    }
    things = (t for r in records for t in r.things)
    head["written"] = {box: t.written for box, t in enumerate(things) if t.written}
    images = [(r.image, *size) for r, size in zip(records, sizes, strict=True)]
    return from_columns(head, images, _rows(records, ids))


def _rows(records: Sequence[Record], ids: Mapping[str, int]) -> Iterator[tuple[int, int, int, Box]]:
    for row, record in enumerate(records):
        for thing in record.things:
            yield row, thing.line, ids[thing.name], thing.box
