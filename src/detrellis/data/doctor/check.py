"""The data-set doctor: `check` looks, `prepare` looks quickly and hands over what training reads.

Files in the folder that are not read are one finding, by suffix, so that nothing is left out
unnoticed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from detrellis.data.annotations import Annotations
from detrellis.data.classes import ClassMap
from detrellis.data.doctor.boxes import Capacity, check_boxes, check_queries
from detrellis.data.doctor.classes import align_classes, check_classes, disagreements
from detrellis.data.doctor.drop import drop_bad
from detrellis.data.doctor.images import check_images, gather, shared_images
from detrellis.data.doctor.masks import check_masks
from detrellis.data.doctor.report import Report, summarise
from detrellis.data.files import walk
from detrellis.data.findings import MALFORMED, Finding, SkipBad, finding
from detrellis.data.layout import DataSource
from detrellis.data.records import RawDataset, to_annotations
from detrellis.data.splits import SplitFiles
from detrellis.errors import UserError

SHOWN = 8  # suffixes that the note names


def check(
    source: DataSource,
    *,
    fast: bool = False,
    progress: bool = False,
    workers: int | None = None,
    splits: Sequence[str] | None = None,
    capacity: Capacity | None = None,
) -> Report:
    """The report of the whole data set, or of the named splits.

    A `fast` check reads the annotations and asks for every file; the full one also decodes every
    image, with `workers` threads (default: one a core) and, with `progress`, a bar on stderr.
    `capacity` is that of the detector which is to learn from the data set. Raises `UserError` where
    a file cannot be read as what it should be.
    """
    raws = source.load_all(splits, outlines=not fast)
    report = examine(raws, fast=fast, progress=progress, workers=workers, capacity=capacity)
    report = report.with_findings(
        [*unused_annotations(source, raws), *outside_folder(source, raws)]
    )
    return report if splits is not None else report.with_findings(unused_files(source, raws))


def examine(
    raws: Mapping[str, RawDataset],
    *,
    fast: bool = False,
    progress: bool = False,
    workers: int | None = None,
    capacity: Capacity | None = None,
    undecoded: Collection[str] = (),
) -> Report:
    """`check` of splits that are already read; no image of those `undecoded` is decoded."""
    facts = {
        split: gather(raw, fast=fast or split in undecoded, progress=progress, workers=workers)
        for split, raw in raws.items()
    }
    findings: list[Finding] = []
    for split, raw in raws.items():
        findings += [
            *raw.findings,
            *_empty(raw),
            *check_images(raw, facts[split]),
            *check_boxes(raw),
        ]
    if not fast:
        findings += [f for raw in raws.values() for f in check_masks(raw)]
    findings += shared_images(raws, facts)
    findings += check_classes(raws)
    if capacity is not None:
        findings += [f for raw in raws.values() for f in check_queries(raw, capacity)]
    return Report(
        tuple(_without_consequences(findings)), tuple(map(summarise, raws.values())), fast
    )


def _without_consequences(findings: Sequence[Finding]) -> list[Finding]:
    """A record of which the reader said what is wrong is not named again for what follows from
    that.
    """
    malformed = {
        (f.split, f.noun, f.row) for f in findings if f.code in MALFORMED and f.row is not None
    }
    return [f for f in findings if f.code in MALFORMED or (f.split, f.noun, f.row) not in malformed]


def _empty(raw: RawDataset) -> list[Finding]:
    """The findings of a split without images or without boxes;
    a test split without boxes, as COCO's, is all right.
    """
    if not len(raw):
        return [finding("no-images", raw.split, raw.source, "no images are listed")]
    if len(raw.ids) or raw.split == "test":
        return []
    looked = f"; looked for files like {raw.label_files[0]}" if raw.label_files else ""
    return [
        finding(
            "no-annotations", raw.split, raw.source, f"{len(raw)} images and not one box{looked}"
        )
    ]


def prepare(
    source: DataSource,
    skip_bad: SkipBad = False,
    capacity: Capacity | None = None,
    *,
    undecoded: Collection[str] = (),
) -> tuple[Annotations, Annotations | None, ClassMap, Report]:
    """Training and validation set (None where there is none),
    the class map of both, and the fast check's report.

    Where the check finds errors, `skip_bad` leaves those records out, and the images that lose an
    object by that (`"boxes"`: these stay); `report.skipped` says how many. Without it a `UserError`
    says what the check says. With it the check is the full one: an image that cannot be decoded is
    a bad record too, but in splits that are `undecoded`.
    """
    raws = source.load_all([split for split in ("train", "val") if split in source.splits])
    if "train" not in raws:
        raise UserError(
            f"the data set has no split `train`, only {', '.join(source.splits)}",
            "Name it with --train.",
        )
    report = examine(raws, fast=not skip_bad, capacity=capacity, undecoded=undecoded)
    report = report.with_findings(unused_annotations(source, raws))
    annotations, report = _annotations(raws, report, raws["train"].classes, skip_bad)
    return annotations["train"], annotations.get("val"), annotations["train"].classes, report


def prepare_split(
    source: DataSource, split: str, classes: ClassMap, skip_bad: SkipBad = False
) -> tuple[Annotations, Report]:
    """One split for a detector that is already trained, and the report:
    as `prepare`, with the detector's `classes`.
    """
    raws = source.load_all([split])
    report = examine(raws, fast=not skip_bad)
    report = report.with_findings(
        disagreements(raws[split], list(zip(classes.ids, classes.names, strict=True)))
    )
    annotations, report = _annotations(raws, report, classes, skip_bad)
    return annotations[split], report


def _annotations(
    raws: Mapping[str, RawDataset], report: Report, classes: ClassMap, skip_bad: SkipBad
) -> tuple[dict[str, Annotations], Report]:
    """What training reads of each split, bad records left out;
    and the report, which counts them.
    """
    if report.errors and not skip_bad:
        raise UserError(
            f"the data set has errors\n{report.text()}",
            "`detrellis check` lists them all, `detrellis check --fix OUT` writes a clean copy, "
            "`--skip-bad` leaves them out.",
        )
    annotations, skipped = {}, {}
    for split, raw in raws.items():
        kept, counts = drop_bad(raw, report.errors, keep_partial=skip_bad == "boxes")
        aligned, changed = align_classes(kept, list(zip(classes.ids, classes.names, strict=True)))
        if not len(aligned.ids):
            what = f"{raw.source}: no box of {split} is left\n{report.text()}"
            raise UserError(what, "Put the data set right first.")
        annotations[split] = to_annotations(aligned, classes)
        skipped[split] = counts | changed
    return annotations, replace(
        report, skipped={split: counts for split, counts in skipped.items() if counts}
    )


def unused_files(source: DataSource, raws: Mapping[str, RawDataset]) -> list[Finding]:
    """The note `unused-files` about everything in the data set's folder that no split reads."""
    unused = _unused(source, raws)
    if not unused:
        return []
    kinds = sorted(unused.items(), key=lambda item: (-len(item[1]), item[0]))
    counts = [
        f"{len(files)} {suffix or 'without a suffix'} ({_first(files)})"
        for suffix, files in kinds[:SHOWN]
    ]
    more = f" and {len(kinds) - SHOWN} more suffixes" if len(kinds) > SHOWN else ""
    count = sum(len(files) for files in unused.values())
    subject = "1 file in this folder is" if count == 1 else f"{count} files in this folder are"
    what = f"{subject} not used: {', '.join(counts)}{more}"
    return [finding("unused-files", "", str(source.folder), what, count=count)]


def outside_folder(source: DataSource, raws: Mapping[str, RawDataset]) -> Iterator[Finding]:
    """The note `outside-folder` of each split with images elsewhere:
    an absolute path, `..` or a link leads there.
    """
    if source.folder is None:
        return
    real = cache(os.path.realpath)
    inside = os.path.join(real(source.folder), "")
    for split, raw in raws.items():
        places = [os.path.join(raw.root, name) for name in raw.file_names if "\0" not in name]
        ends = (
            real(p) if os.path.islink(p) else os.path.join(real(os.path.dirname(p)), "")
            for p in places
        )
        outside = [
            p
            for p, end in zip(places, ends, strict=True)
            if not end.startswith(inside) and os.path.exists(p)
        ]
        if outside:
            what = (
                f"{len(outside)} of {len(raw)} images are outside {source.folder}, the first: "
                f"{real(outside[0])}"
            )
            yield finding("outside-folder", split, raw.source, what, count=len(outside))


def unused_annotations(source: DataSource, raws: Mapping[str, RawDataset]) -> list[Finding]:
    """The warning `unused-annotations` where more annotation files are left out than read.

    Only where each image has a file of its own (YOLO, Pascal VOC, ...), and all splits are in
    `raws`.
    """
    labels = [
        file for raw in raws.values() for file in raw.label_files or () if os.path.isfile(file)
    ]
    if not labels or set(raws) != set(source.splits):
        return []
    suffixes = {_suffix(file) for file in labels}
    unused = _unused(source, raws)
    alike = [file for suffix in sorted(suffixes) for file in unused.get(suffix, ())]
    if len(alike) <= len(set(labels)):
        return []
    what = (
        f"{len(alike)} of {len(alike) + len(set(labels))} annotation files are not used: "
        f"{_first(alike)}"
    )
    return [finding("unused-annotations", "", str(source.folder), what, count=len(alike))]


def _unused(source: DataSource, raws: Mapping[str, RawDataset]) -> dict[str, list[str]]:
    """Files that are not read, relative to the folder, by suffix in lower case;
    none where no folder was given.
    """
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
        yield from (
            str(path)
            for path in (files.annotations, files.listing, *files.images)
            if path is not None
        )
    for raw in raws.values():
        root = str(raw.root)
        yield from (os.path.join(root, name) for name in raw.file_names)
        yield from raw.label_files or ()


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _first(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]}, ..."
