"""What is printed: whole names on a terminal of any width,
plain lines into a pipe, and nothing read as markup.
"""

from __future__ import annotations

import io
import sys

import pytest
from rich.table import Table
from rich.text import Text

from detrellis.terminal import Terminal, column_widths, encodable, never_fail_to_print, plain_lines

LONG = "align-h-deformable-detr-r50"


def table(title: str | None = None) -> Table:
    made = Table("recipe", "what it is", title=title)
    made.add_column("epochs", justify="right")
    made.add_row(Text(LONG), "the paper's network with hybrid matching and aligned losses", "12")
    made.add_row(Text("[red]"), "two\nlines :dog:", "300")
    return made


def printed(*objects: object, width: int | None = None, encoding: str = "utf-8") -> str:
    """Into a pipe, or on a terminal of that width."""
    bytes_ = io.BytesIO()
    file = io.TextIOWrapper(bytes_, encoding=encoding, errors="backslashreplace")
    console = Terminal(
        file=file, force_terminal=width is not None, width=width, height=50, color_system=None
    )
    console.print(*objects)
    file.flush()
    return bytes_.getvalue().decode(encoding)


def test_a_table_in_a_pipe_is_lines_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = printed(table("a [title] of more letters than the forty that fit")).splitlines()
    assert lines[0] == "a [title] of more letters than the forty that fit"
    assert lines[1].split() == ["recipe", "what", "it", "is", "epochs"]
    assert (
        lines[2] == f"{LONG}  the paper's network with hybrid matching and aligned losses      12"
    )
    assert lines[3].split() == ["[red]", "two", "300"]
    assert lines[4].strip() == "lines :dog:"
    assert lines[1:] == plain_lines(table())


@pytest.mark.parametrize("width", [100, 80, 60, 30])
def test_a_table_on_a_terminal_breaks_no_word(width: int) -> None:
    text = printed(table(), width=width)
    words = {"recipe", "epochs", LONG, "[red]", "hybrid", "matching", ":dog:", "300"}
    assert words <= set(text.split())
    drawn = any(letter in text for letter in "┃│")
    assert drawn == (width >= 60)
    assert not drawn or max(map(len, text.splitlines())) <= width


def test_boxes_are_drawn_in_letters_that_the_console_has() -> None:
    text = printed(table(), width=80, encoding="ascii")
    assert "+--" in text or "|" in text


def test_what_is_printed_is_no_markup_and_no_line_is_cut() -> None:
    path = "/data/[red]/" + "x" * 200
    assert printed(path) == f"{path}\n"
    assert printed(path, width=None) == printed(Text(path))


def test_narrow_columns_get_what_they_want_first() -> None:
    assert column_widths(30, [5, 5, 5], [6, 5, 100]) == [6, 5, 19]
    assert column_widths(15, [5, 5, 5], [6, 5, 100]) == [5, 5, 5]
    assert column_widths(200, [5, 5, 5], [6, 5, 100]) == [6, 5, 100]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_any_name_can_be_printed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    never_fail_to_print()
    Terminal().print(table(), "\u732b \udcff")
    sys.stdout.flush()
    assert b"\\u732b \\udcff" in out.getvalue()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_table_with_names_that_the_console_lacks_keeps_its_frame(encoding: str) -> None:
    made = Table("\u7a2e", "boxes")
    made.add_row(Text("\u732b\u732b \u72ac", "bold"), "7")
    made.add_row("cat", "12")
    text = printed(made, width=60, encoding=encoding)
    assert "\\u732b\\u732b \\u72ac" in text
    assert "\\u7a2e" in text
    assert len(set(map(len, text.splitlines()))) == 1
    lines = printed(made, encoding=encoding).splitlines()
    assert [line.rindex(end) for line, end in zip(lines, ("boxes", "7", "12"), strict=True)] == [
        21,
        21,
        21,
    ]


def test_escaping_keeps_the_styles_at_their_characters() -> None:
    made = Table()
    made.add_column("name", no_wrap=True)
    made.add_row(Text.assemble("a\u732b", ("bc", "red"), "\u72ac"))
    (column,) = encodable(made, "ascii").columns
    (cell,) = column.cells
    assert isinstance(cell, Text)
    assert cell.plain == "a\\u732bbc\\u72ac"
    assert [(cell.plain[span.start : span.end], span.style) for span in cell.spans] == [
        ("bc", "red")
    ]
    assert column.no_wrap
