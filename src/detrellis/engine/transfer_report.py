"""What became of every tensor when a detector started from other weights,
for people and for programs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from detrellis.data.classes import ClassMap

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
ORDER = (
    "backbone",
    "neck",
    "encoder",
    "proposals",
    "queries",
    "decoder",
    "box heads",
    "class heads",
    "other",
)
_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # the index of a layer, or of another numbered module
MOST_ROWS, MOST_NAMES = 12, 12  # in the table; `to_dict` has them all


@dataclass(frozen=True)
class TensorFate:
    """One tensor, and how many of its numbers were loaded,
    stayed as initialised, or found no place.
    """

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
class NotLoaded:
    """Tensors that were not loaded whole: a module or one tensor, of one layer or of several."""

    place: str  # decoder.layers.3-5
    outcome: Outcome
    reason: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class ClassRows:
    """The classes whose rows were kept, those that start fresh,
    and those of the weights that found no place.
    """

    REASON: ClassVar[str] = "class rows by name"

    same: bool
    kept: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    @classmethod
    def of(cls, classes: ClassMap, source: ClassMap, rows: Sequence[tuple[int, int]]) -> ClassRows:
        """The classes by what became of their rows;
        `rows` are pairs of a class here and one in the weights.
        """
        ours, theirs = {i for i, _ in rows}, {j for _, j in rows}
        names = list(enumerate(classes.names))
        return cls(
            len(rows) == len(classes) == len(source) and all(i == j for i, j in rows),
            tuple(n for i, n in names if i in ours),
            tuple(n for i, n in names if i not in ours),
            tuple(n for j, n in enumerate(source.names) if j not in theirs),
        )

    def to_dict(self) -> dict[str, Any]:
        """The classes as JSON holds them."""
        return {
            "same": self.same,
            "kept": list(self.kept),
            "new": list(self.new),
            "left": list(self.left),
        }

    def text(self) -> str:
        """The classes in a sentence."""
        if self.same:
            return f"class rows: the same {plural(len(self.kept), 'class')}, all kept"
        parts = [
            (
                f"class rows kept by name: {_shortened(self.kept)} ({len(self.kept)} of "
                f"{len(self.kept + self.new)})"
            )
        ]
        parts += [f"new: {_shortened(self.new)}"] if self.new else []
        parts += [f"not needed: {_shortened(self.left)}"] if self.left else []
        return "; ".join(parts)


@dataclass(frozen=True)
class TransferReport:
    """How a detector was filled. `fates`:
    in the order of its tensors, then those that only the weights have.
    """

    fates: tuple[TensorFate, ...]
    classes: ClassRows

    def parts(self) -> dict[str, dict[Outcome, tuple[int, int]]]:
        """How many tensors and parameters of each part of the network had each outcome.

        Of tensors that were loaded in part, only the loaded parameters count.
        """
        parts: dict[str, dict[Outcome, tuple[int, int]]] = {}
        for part in ORDER:
            fates = [f for f in self.fates if f.part == part]
            if fates:
                parts[part] = {o: _count([f for f in fates if f.outcome == o]) for o in OUTCOMES}
        return parts

    def exceptions(self) -> list[NotLoaded]:
        """What was not loaded whole, modules and layers of the same fate together;
        class rows are listed elsewhere.
        """
        groups: dict[tuple[str, Outcome, str], list[tuple[str, Sequence[TensorFate]]]] = {}
        for place, fates in _subtrees("", self.fates):
            outcome, reason = fates[0].outcome, fates[0].reason
            if outcome != "loaded" and reason != ClassRows.REASON:
                groups.setdefault((_LAYER.sub("#", place, count=1), outcome, reason), []).append(
                    (place, fates)
                )
        return [_not_loaded(group) for group in groups.values()]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "parts": {
                part: {o: {"tensors": n, "parameters": p} for o, (n, p) in counts.items()}
                for part, counts in self.parts().items()
            },
            "exceptions": [asdict(e) for e in self.exceptions()],
            "classes": self.classes.to_dict(),
        }

    def table(self, origin: str = "") -> Group:
        """Parts, exceptions and class rows for a console of 80 columns or more;
        `origin` says where from.
        """
        parts: list[Table | Text] = (
            [Text.assemble("Start from ", (origin, "bold"), "\n")] if origin else []
        )
        parts += [self._parts_table(), Text()]
        exceptions = self.exceptions()
        for outcome in OUTCOMES[1:]:
            if alike := [e for e in exceptions if e.outcome == outcome]:
                parts += [_exceptions_table(outcome, alike), Text()]
        return Group(*parts, Text(self.classes.text()))

    def _parts_table(self) -> Table:
        """One row per part of the network; a column only for outcomes that occurred."""
        parts = self.parts()
        shown = [
            o for o in OUTCOMES if o == "loaded" or any(counts[o][0] for counts in parts.values())
        ]
        table = _plain_table("part")
        for outcome in shown:
            table.add_column(outcome, justify="right", no_wrap=True)
        for part, counts in parts.items():
            table.add_row(part, *(_tensors(*counts[o]) for o in shown))
        return table


def _subtrees(
    prefix: str, fates: Sequence[TensorFate]
) -> Iterator[tuple[str, Sequence[TensorFate]]]:
    """The largest modules all of whose tensors had the same fate, down to single tensors."""
    if len({(f.outcome, f.reason) for f in fates}) == 1:
        yield prefix, fates
        return
    start = len(prefix) + 1 if prefix else 0
    children: dict[str, list[TensorFate]] = {}
    for f in fates:
        end = f.name.find(".", start)
        children.setdefault(f.name if end < 0 else f.name[:end], []).append(f)
    for place, inside in children.items():
        yield from _subtrees(place, inside)


def _joined(places: Sequence[str]) -> str:
    """Places that differ in a layer's index as one, such as `decoder.layers.3-4.norm`."""
    if len(places) == 1:
        return places[0]
    layers = sorted(int(m[0]) for place in places if (m := _LAYER.search(place)))
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    ranges = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return _LAYER.sub(ranges, places[0], count=1)


def _count(fates: Sequence[TensorFate]) -> tuple[int, int]:
    """The number of tensors, and of the parameters that their outcome is about."""
    return len(fates), sum(f.loaded or f.fresh or f.skipped for f in fates)


def _not_loaded(group: Sequence[tuple[str, Sequence[TensorFate]]]) -> NotLoaded:
    """Modules of the same fate that differ in the layer only; the largest tensor stands for all."""
    fates = [f for _, inside in group for f in inside]
    largest = max(fates, key=lambda f: f.loaded + f.fresh + f.skipped)
    reason = f"{largest.reason}: {largest.detail}" if largest.detail else largest.reason
    return NotLoaded(
        _joined([place for place, _ in group]), largest.outcome, reason, *_count(fates)
    )


def _exceptions_table(outcome: Outcome, exceptions: Sequence[NotLoaded]) -> Table:
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
    """A count of parameters, such as `960`, `12.3k` or `11.2M`."""
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


def plural(count: int, noun: str) -> str:
    """A count with its noun, such as `1 class` or `2 classes`."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def _shortened(names: Sequence[str]) -> str:
    """The first names, joined; all of them would bury the rest where a data set has hundreds."""
    if len(names) <= MOST_NAMES:
        return ", ".join(names) or "none"
    return f"{', '.join(names[: MOST_NAMES - 1])} and {len(names) - MOST_NAMES + 1} more"
