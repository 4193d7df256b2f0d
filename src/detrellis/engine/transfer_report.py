"""What became of every tensor when a detector started from other weights, for people and for programs."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from detrellis.data.classes import ClassMap
from detrellis.terminal import Terminal

Outcome = Literal["loaded", "in part", "re-initialised", "skipped"]
OUTCOMES: tuple[Outcome, ...] = ("loaded", "in part", "re-initialised", "skipped")
# In the order of the network; the first that a name starts with.
PARTS = {
    "backbone.": "backbone",
    "neck.": "neck",
    "encoder.": "encoder",
    "queries.head.classify.": "class heads",
    "queries.head.": "proposals",
    "queries.": "queries",
    "decoder.heads.classes.": "class heads",
    "decoder.heads.": "box heads",
    "decoder.": "decoder",
    "": "other",
}
ORDER = ("backbone", "neck", "encoder", "proposals", "queries", "decoder", "box heads", "class heads", "other")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # the index of a layer, or of another numbered module
MOST_ROWS, MOST_NAMES = 12, 12  # in the table; `to_dict` has them all


@dataclass(frozen=True)
class Fate:
    """One tensor, and how many of its numbers were loaded, stayed as initialised, or found no place."""

    name: str
    outcome: Outcome
    loaded: int = 0
    fresh: int = 0
    skipped: int = 0
    reason: str = ""
    detail: str = ""  # of the reason, where every tensor has its own

    @property
    def part(self) -> str:
        """The part of the network that it belongs to."""
        return next(part for start, part in PARTS.items() if self.name.startswith(start))


@dataclass(frozen=True)
class Exempt:
    """Tensors that were not simply loaded: a module or one tensor, of one layer or of several."""

    place: str  # decoder.layers.3-5
    outcome: Outcome
    reason: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class ClassRows:
    """The classes whose rows were kept, those that start fresh, and those of the weights that found no place."""

    REASON: ClassVar[str] = "class rows by name"

    same: bool
    kept: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    @classmethod
    def of(cls, classes: ClassMap, source: ClassMap, rows: Sequence[tuple[int, int]]) -> ClassRows:
        """From pairs of a class here and one in the weights."""
        ours, theirs = {i for i, _ in rows}, {j for _, j in rows}
        names = list(enumerate(classes.names))
        return cls(
            len(rows) == len(classes) == len(source) and all(i == j for i, j in rows),
            tuple(n for i, n in names if i in ours),
            tuple(n for i, n in names if i not in ours),
            tuple(n for j, n in enumerate(source.names) if j not in theirs),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"same": self.same, "kept": list(self.kept), "new": list(self.new), "left": list(self.left)}

    def text(self) -> str:
        """In a sentence."""
        if self.same:
            return f"class rows: the same {plural(len(self.kept), 'class')}, all kept"
        parts = [f"class rows kept by name: {_listed(self.kept)} ({len(self.kept)} of {len(self.kept + self.new)})"]
        parts += [f"new: {_listed(self.new)}"] if self.new else []
        parts += [f"not needed: {_listed(self.left)}"] if self.left else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Transfer:
    """How a detector was filled. `fates`: in the order of its tensors, then those that only the weights have."""

    fates: tuple[Fate, ...]
    classes: ClassRows

    def parts(self) -> dict[str, dict[Outcome, tuple[int, int]]]:
        """Of each part of the network and outcome, tensors and parameters; of those in part, the loaded ones."""
        parts: dict[str, dict[Outcome, tuple[int, int]]] = {}
        for part in ORDER:
            fates = [f for f in self.fates if f.part == part]
            if fates:
                parts[part] = {o: _count([f for f in fates if f.outcome == o]) for o in OUTCOMES}
        return parts

    def exceptions(self) -> list[Exempt]:
        """What was not simply loaded, modules and layers with the same fate together; class rows are told apart."""
        groups: dict[tuple[str, Outcome, str], list[tuple[str, Sequence[Fate]]]] = {}
        for place, fates in _subtrees("", self.fates):
            outcome, reason = fates[0].outcome, fates[0].reason
            if outcome != "loaded" and reason != ClassRows.REASON:
                groups.setdefault((_LAYER.sub("#", place, count=1), outcome, reason), []).append((place, fates))
        return [_exempt(found) for found in groups.values()]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "parts": {
                part: {o: {"tensors": n, "parameters": p} for o, (n, p) in counts.items()}
                for part, counts in self.parts().items()
            },
            "exceptions": [asdict(e) for e in self.exceptions()],
            "classes": self.classes.to_dict(),
        }

    def table(self, origin: str = "") -> Group:
        """Parts, exceptions and class rows for a console of 80 columns or more; `origin` says where from."""
        parts: list[Table | Text] = [Text.assemble("Start from ", (origin, "bold"), "\n")] if origin else []
        parts += [self._parts_table(), Text()]
        exceptions = self.exceptions()
        for outcome in OUTCOMES[1:]:
            if found := [e for e in exceptions if e.outcome == outcome]:
                parts += [_exceptions_table(outcome, found), Text()]
        return Group(*parts, Text(self.classes.text()))

    def text(self) -> str:
        """The table as plain lines, for a log."""
        file = io.StringIO()
        Terminal(file=file, force_terminal=False).print(self.table())
        return file.getvalue()

    def _parts_table(self) -> Table:
        """A row a part; a column only where something happened."""
        parts = self.parts()
        shown = [o for o in OUTCOMES if o == "loaded" or any(counts[o][0] for counts in parts.values())]
        table = _plain_table("part")
        for outcome in shown:
            table.add_column(outcome, justify="right", no_wrap=True)
        for part, counts in parts.items():
            table.add_row(part, *(_tensors(*counts[o]) for o in shown))
        return table


def _subtrees(prefix: str, fates: Sequence[Fate]) -> Iterator[tuple[str, Sequence[Fate]]]:
    """The largest modules all of whose tensors had the same fate; down to single tensors."""
    if len({(f.outcome, f.reason) for f in fates}) == 1:
        yield prefix, fates
        return
    start = len(prefix) + 1 if prefix else 0
    children: dict[str, list[Fate]] = {}
    for f in fates:
        end = f.name.find(".", start)
        children.setdefault(f.name if end < 0 else f.name[:end], []).append(f)
    for place, inside in children.items():
        yield from _subtrees(place, inside)


def _joined(places: Sequence[str]) -> str:
    """`decoder.layers.3.norm`, `decoder.layers.4.norm` as `decoder.layers.3-4.norm`."""
    if len(places) == 1:
        return places[0]
    found = [m for p in places if (m := _LAYER.search(p))]
    numbers = sorted(int(m[0]) for m in found)
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    ranges = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return _LAYER.sub(ranges, places[0], count=1)


def _count(fates: Sequence[Fate]) -> tuple[int, int]:
    """Tensors, and the parameters that the outcome is about."""
    return len(fates), sum(f.loaded or f.fresh or f.skipped for f in fates)


def _exempt(found: Sequence[tuple[str, Sequence[Fate]]]) -> Exempt:
    """Modules of the same fate that differ in the layer only; the largest tensor stands for all."""
    fates = [f for _, inside in found for f in inside]
    largest = max(fates, key=lambda f: f.loaded + f.fresh + f.skipped)
    reason = f"{largest.reason}: {largest.detail}" if largest.detail else largest.reason
    return Exempt(_joined([place for place, _ in found]), largest.outcome, reason, *_count(fates))


def _exceptions_table(outcome: Outcome, exceptions: Sequence[Exempt]) -> Table:
    table = _plain_table(outcome)
    table.columns[0].no_wrap = True
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("why")
    for e in exceptions[:MOST_ROWS]:
        table.add_row(Text(e.place), str(e.tensors), e.reason)
    if rest := exceptions[MOST_ROWS:]:
        table.add_row(f"and {len(rest)} more", str(sum(e.tensors for e in rest)))
    return table


def _plain_table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    return table


def _tensors(count: int, parameters: int) -> str:
    return f"{count} ({amount(parameters)})" if count else "-"


def amount(number: int) -> str:
    """`960`, `12.3k`, `11.2M`."""
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


def plural(count: int, noun: str) -> str:
    """`1 class`, `2 classes`."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def _listed(names: Sequence[str]) -> str:
    """The first names; all of them would bury the rest where a data set has hundreds."""
    if len(names) <= MOST_NAMES:
        return ", ".join(names) or "none"
    return f"{', '.join(names[: MOST_NAMES - 1])} and {len(names) - MOST_NAMES + 1} more"
