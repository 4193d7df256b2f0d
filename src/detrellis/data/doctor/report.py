"""`Report`: all findings with a summary, as a table for people and as JSON for programs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from detrellis.data.findings import RULES, SEVERITIES, Finding
from detrellis.data.records import RawDataset

EXAMPLES = 3  # of each kind in the table; JSON has them all
CLASSES = 12  # rows of the table of classes
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
SMALL, MEDIUM = 32**2, 96**2  # COCO's bounds, in square pixels


@dataclass(frozen=True)
class Report:
    """All findings of a check, with a summary of each split."""

    findings: tuple[Finding, ...]
    summaries: tuple[SplitSummary, ...]
    fast: bool  # whether the images were left undecoded
    # By split and code, what `prepare` left out or changed before training.
    skipped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that training does not start with."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def exit_code(self) -> int:
        """1 where there are errors; warnings and notes are no failure."""
        return 1 if self.errors else 0

    def with_findings(self, findings: Iterable[Finding]) -> Report:
        """The same report with further findings."""
        return replace(self, findings=(*self.findings, *findings))

    def counts(self) -> dict[str, int]:
        """Records by severity: a finding may stand for many."""
        counts = Counter[str]()
        for f in self.findings:
            counts[f.severity] += f.count
        return {severity: counts[severity] for severity in SEVERITIES}

    def groups(self) -> list[tuple[Finding, ...]]:
        """Findings of one code in one split together, the gravest first."""
        codes = list(RULES)
        ordered = sorted(
            self.findings,
            key=lambda f: (SEVERITIES.index(f.severity), codes.index(f.code), f.split),
        )
        return [
            tuple(group)
            for _, group in groupby(ordered, key=lambda f: (f.severity, f.code, f.split))
        ]

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it: every finding, none grouped away."""
        return {
            "ok": self.exit_code == 0,
            "fast": self.fast,
            "counts": self.counts(),
            "splits": [asdict(summary) for summary in self.summaries],
            "findings": [f.to_dict() for f in self.findings],
            "skipped": {split: dict(counts) for split, counts in self.skipped.items()},
        }

    def text(self, severity: str = "error", limit: int = 6) -> str:
        """The findings of one severity in a few lines,
        at most `limit` kinds of them, for an error message.
        """
        groups = [group for group in self.groups() if group[0].severity == severity]
        lines = [
            f"{_count(group)} {group[0].code}{_of(group[0])}: {describe(group[0])}"
            for group in groups[:limit]
        ]
        if len(groups) > limit:
            lines.append(f"and {len(groups) - limit} more kinds")
        return "\n".join(f"  {line}" for line in lines)

    def table(self) -> Group:
        """Splits, classes and findings for a console of 100 columns or more."""
        parts: list[Table | Text] = [_splits_table(self.summaries), _classes_table(self.summaries)]
        if self.findings:
            parts.append(_findings_table(self.groups()))
        counts = self.counts()
        totals = ", ".join(_plural(counts[severity], severity) for severity in SEVERITIES)
        depth = (
            "The images were not decoded (fast check)." if self.fast else "Every image was decoded."
        )
        colour = "red" if self.errors else "green"
        parts.append(Text.assemble((totals, colour), f". {depth}"))
        return Group(*parts)


def describe(f: Finding) -> str:
    """Where a finding is, and what it is: `cats/7.jpg, image id 7: no such file`."""
    return f"{_where(f)}: {f.what}"


def _of(f: Finding) -> str:
    return f" in {f.split}" if f.split else ""


def _where(f: Finding, in_file: str = "") -> str:
    """File, id and line; without the file where it is `in_file`, which the reader has just read."""
    place = [shorten(f.file)] if f.file != in_file else []
    if f.id is not None:
        place.append(f"{f.noun} id {f.id}")
    if f.line is not None:
        place.append(f"line {f.line}" if f.file.endswith(".txt") else f"object {f.line}")
    return ", ".join(place)


def shorten(path: str) -> str:
    """Relative to the current folder where the file is below it."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive
        return path
    return path if relative.startswith("..") else relative


def _count(group: Iterable[Finding]) -> int:
    return sum(f.count for f in group)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _splits_table(summaries: Sequence[SplitSummary]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("split")
    for title in ("images", "empty", "boxes", "mean", "most", "crowd", "small", "medium", "large"):
        table.add_column(title, justify="right", no_wrap=True)
    for s in summaries:
        total = max(s.boxes, 1)
        sizes = [f"{count / total:.0%}" for count in s.box_sizes]
        counts = [f"{n:,}" for n in (s.images, s.images_without_boxes, s.boxes)]
        table.add_row(
            s.split,
            *counts,
            f"{s.boxes / max(s.images, 1):.1f}",
            str(s.most_boxes),
            f"{s.crowd:,}",
            *sizes,
        )
    frames = [" .. ".join(dict.fromkeys(f"{w}x{h}" for w, h in s.image_sizes)) for s in summaries]
    table.caption = "Width x height: " + "; ".join(
        f"{s.split} {f}" for s, f in zip(summaries, frames, strict=True)
    )
    table.caption_justify = "left"
    return table


def _classes_table(summaries: tuple[SplitSummary, ...]) -> Table:
    """The classes of the first split, most frequent first, with their counts in all."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class", overflow="fold")
    table.add_column("id", justify="right")
    for s in summaries:
        table.add_column(f"{s.split} boxes (images)", justify="right")
    rows = sorted(summaries[0].classes, key=lambda c: -c.boxes) if summaries else []
    by_name = [{c.name: c for c in s.classes} for s in summaries]
    for row in rows[:CLASSES]:
        counts = (classes.get(row.name) for classes in by_name)
        cells = ["-" if c is None else f"{c.boxes:,} ({c.images:,})" for c in counts]
        table.add_row(Text(row.name), str(row.id), *cells)
    if len(rows) > CLASSES:
        table.add_row(f"and {len(rows) - CLASSES} more", "", *("" for _ in summaries))
    return table


def _findings_table(groups: Iterable[tuple[Finding, ...]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    table.add_column("finding", no_wrap=True)
    table.add_column("count", justify="right")
    table.add_column("where and what", overflow="fold", ratio=1)
    for group in groups:
        first = group[0]
        name = Text.assemble(
            (first.code, COLOURS[first.severity]), f"\n{first.severity}{_of(first)}"
        )
        table.add_row(name, f"{_count(group):,}", _examples(group))
    return table


def _examples(group: tuple[Finding, ...]) -> Text:
    cell, file = Text(), ""
    for f in group[:EXAMPLES]:
        where = _where(f, file) or "also"
        cell.append(where, style="bold").append(f": {f.what}\n")
        file = f.file
    if len(group) > EXAMPLES:
        cell.append(f"and {len(group) - EXAMPLES:,} more like these\n", style="dim")
    for remedy in dict.fromkeys(f.remedy for f in group[:EXAMPLES]):
        cell.append(f"-> {remedy}\n", style="italic")
    return cell


@dataclass(frozen=True)
class ClassCount:
    """How often one class occurs."""

    id: int
    name: str
    boxes: int
    images: int


@dataclass(frozen=True)
class SplitSummary:
    """Counts of the images, boxes and classes of one split."""

    split: str
    source: str
    images: int
    images_without_boxes: int
    boxes: int
    crowd: int
    most_boxes: int  # in one image
    box_sizes: tuple[int, int, int]  # small, medium, large, as COCO has them
    # Smallest, median and largest (width, height), by area
    image_sizes: tuple[tuple[int, int], ...]
    classes: tuple[ClassCount, ...]


def summarise(raw: RawDataset) -> SplitSummary:
    """The summary of one split."""
    per_image = np.bincount(raw.box_rows[raw.box_rows >= 0], minlength=len(raw))
    areas = np.nan_to_num(raw.boxes[:, 2] * raw.boxes[:, 3])
    small, medium = int((areas < SMALL).sum()), int(((areas >= SMALL) & (areas < MEDIUM)).sum())
    return SplitSummary(
        split=raw.split,
        source=str(raw.source),
        images=len(raw),
        images_without_boxes=int((per_image == 0).sum()),
        boxes=len(raw.ids),
        crowd=int(raw.crowd.sum()),
        most_boxes=int(per_image.max(initial=0)),
        box_sizes=(small, medium, len(raw.ids) - small - medium),
        image_sizes=_image_sizes(raw),
        classes=_classes(raw),
    )


def _image_sizes(raw: RawDataset) -> tuple[tuple[int, int], ...]:
    sizes = raw.sizes[(raw.sizes > 0).all(axis=1)]
    if not len(sizes):
        return ()
    order = np.argsort(sizes.prod(axis=1), kind="stable")
    places = (order[0], order[len(order) // 2], order[-1])
    return tuple((int(sizes[p, 1]), int(sizes[p, 0])) for p in places)


def _classes(raw: RawDataset) -> tuple[ClassCount, ...]:
    boxes = Counter(raw.box_categories.tolist())
    pairs = np.unique(np.stack([raw.box_categories, raw.box_image_ids], axis=1), axis=0)
    images = Counter(pairs[:, 0].tolist())  # each image once for each of its categories
    return tuple(ClassCount(i, name, boxes[i], images[i]) for i, name in raw.categories)
