"""What is printed: tables that fit the terminal with every name whole,
and plain lines where there is no terminal.

Nothing that is printed is read as markup, so a path or a class may be called `[red]` or `:dog:`.
Nothing steers the terminal either: a name may come from anybody's data set, and its control
characters are shown as `\\x1b`.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import replace
from itertools import accumulate, zip_longest
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Span, Text

UNBOUNDED = 100_000  # columns: more than any table has
GAP = "  "  # between the columns of a plain table
# And those that turn text around
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ESCAPES = "backslashreplace"  # how characters are printed that the console's encoding lacks


class Terminal(Console):
    """A rich console whose strings are literal.
    Where it is no terminal, nothing is wrapped, cut, drawn or coloured.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False, **more: Any) -> None:
        super().__init__(
            stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, **more
        )

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich prints, but for tables (see the top of the file);
        where it is no terminal, a line stays a line.
        """
        if any(isinstance(each, (Table, Group)) for each in objects):
            for each in objects:
                self._print_whole(each)
        else:
            super().print(*objects, **({} if self.is_terminal else {"soft_wrap": True}) | how)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """As rich does, without control characters in any text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def say(self, *parts: str | tuple[str, str], style: str = "") -> None:
        """One line, of texts and of texts with a style;
        never wrapped, so that what is copied from it is whole.
        """
        super().print(Text.assemble(*parts, style=style), soft_wrap=True)

    def heading(self, text: str) -> None:
        """A line that begins a part."""
        if self.is_terminal:
            self.rule(text)
        else:
            self.say(f"== {text}")

    def _print_whole(self, thing: Any) -> None:
        if isinstance(thing, Group):
            for each in thing.renderables:
                self._print_whole(each)
        elif isinstance(thing, Table):
            self._print_table(thing)
        else:
            self.print(thing)

    def _print_table(self, table: Table) -> None:
        """The title and the caption are lines of their own:
        rich would break them at the table's width.
        """
        table = encodable(table, self.encoding)
        fitting = fitted(table, self) if self.is_terminal else None
        if table.title is not None:
            self.say((_text(table.title).plain, "italic"))
        if fitting is None:
            for text in plain_lines(table):
                self.say(text)
        else:
            super().print(fitting)
        if table.caption is not None:
            super().print(
                Text(_text(table.caption).plain, "dim italic"), soft_wrap=not self.is_terminal
            )


def visible(text: str) -> str:
    """The text with `\\x1b` for characters that steer a terminal,
    all but tabs and ends of lines.
    """
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def encodable(table: Table, encoding: str) -> Table:
    """The table with what `encoding` cannot say, or nobody can see,
    as `\\u732b`, so that what is measured is what is printed."""
    printed = copy(table)
    printed.columns = [
        replace(
            column,
            header=_escaped(_text(column.header), encoding),
            _cells=[_escaped(_text(cell), encoding) for cell in column.cells],
        )
        for column in table.columns
    ]
    return printed


def _escaped(text: Text, encoding: str) -> Text:
    """The text with characters escaped that `encoding` lacks or that steer a terminal,
    its styles at the same ones.
    """
    pieces = [visible(letter).encode(encoding, ESCAPES).decode(encoding) for letter in text.plain]
    escaped = "".join(pieces)
    if escaped == text.plain:
        return text
    starts = list(accumulate(map(len, pieces), initial=0))
    result = text.blank_copy(escaped)
    result.spans = [Span(starts[span.start], starts[span.end], span.style) for span in text.spans]
    return result


def fitted(table: Table, console: Console) -> Table | None:
    """The table, without title and caption, in columns that fit the console and break no word;
    None where none do.
    """
    columns = _columns(table)
    widest = [_widest(line for text in cells for line in text.splitlines()) for cells in columns]
    narrowest = [_widest(word for text in cells for word in text.split()) for cells in columns]
    for i, column in enumerate(table.columns):
        narrowest[i] = widest[i] if column.no_wrap else narrowest[i]
    shown = copy(table)
    shown.title = shown.caption = None
    frame = Measurement.get(console, console.options.update(width=UNBOUNDED), shown).maximum - sum(
        widest
    )
    room = console.width - frame
    if room < sum(narrowest):
        return None
    shown.columns = [copy(column) for column in table.columns]
    for column, width in zip(shown.columns, column_widths(room, narrowest, widest), strict=True):
        column.width = width
    return shown


def column_widths(room: int, narrowest: list[int], widest: list[int]) -> list[int]:
    """A width for each column between its narrowest and its widest, in sum at most `room`.

    Columns that want little more get all of it first. `room` is at least the sum of `narrowest`.
    """
    widths, left = list(narrowest), room - sum(narrowest)
    order = sorted(range(len(widths)), key=lambda i: widest[i] - narrowest[i])
    for done, i in enumerate(order):
        more = min(widest[i] - narrowest[i], left // (len(order) - done))
        widths[i] += more
        left -= more
    return widths


def plain_lines(table: Table) -> list[str]:
    """The table as lines of text, each row a line unless a cell has several;
    columns are two spaces apart.
    """
    columns = _columns(table)
    widths = [_widest(line for text in cells for line in text.splitlines()) for cells in columns]
    right = [column.justify == "right" for column in table.columns]
    lines = []
    for row in zip(*columns, strict=True):
        for parts in zip_longest(*(text.splitlines() for text in row), fillvalue=""):
            cells = [_padded(*cell) for cell in zip(parts, widths, right, strict=True)]
            lines.append(GAP.join(cells).rstrip())
    return lines


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _columns(table: Table) -> list[list[str]]:
    """Header and cells of each column, as plain text."""
    columns = []
    for column in table.columns:
        header = [column.header] if table.show_header else []
        columns.append([_text(cell).plain for cell in (*header, *column.cells)])
    return columns


def _widest(texts: Iterable[str]) -> int:
    """Columns of the terminal that the widest text takes; 0 where there is none."""
    return max(map(cell_len, texts), default=0)


def _text(of: Any) -> Text:
    assert isinstance(of, (str, Text)), f"a cell that is no text: {of!r}"
    return Text(of) if isinstance(of, str) else of


def never_fail_to_print() -> None:
    """Show what the console's encoding cannot say as `\\u732b`,
    instead of failing with `UnicodeEncodeError`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=ESCAPES)
