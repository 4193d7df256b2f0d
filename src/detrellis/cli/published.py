"""What `detrellis reproduce` lists: papers, their tables, and rows with the published figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from detrellis.cli.options import console, print_json
from detrellis.engine.console import number

if TYPE_CHECKING:
    from detrellis.recipes import tables


def show_published(paper: str | None, table: str | None, as_json: bool) -> None:
    """List all papers, the tables of one, or the rows of a table."""
    from detrellis.recipes.tables import load_paper, papers

    if paper is None:
        known = [load_paper(name) for name in papers()]
        listed = _sheet("paper", "title", "tables")
        for each in known:
            listed.add_row(each.name, Text(each.title), ", ".join(t.id for t in each.tables))
        _show([{"name": p.name, "title": p.title, "tables": [t.id for t in p.tables]} for p in known], listed, as_json)
    elif table is None:
        one = load_paper(paper)
        listed = _sheet("table", "title", "rows", "can be run", title=one.title)
        for each_table in one.tables:
            able = sum(not row.missing for row in each_table.rows)
            listed.add_row(each_table.id, Text(each_table.title), str(len(each_table.rows)), str(able))
        _show(one.model_dump(mode="json"), listed, as_json)
    else:
        rows = load_paper(paper).table(table)
        _show(rows.model_dump(mode="json"), _rows(rows), as_json)


def _rows(of: tables.PaperTable) -> Table:
    """A table of the published figures of each row, and whether it can be run."""
    listed = _sheet("", "row", "epochs", "AP", "gain", "AP50", "recipe", "note", title=f"{of.title} ({of.data})")
    for column in listed.columns:
        column.overflow = "fold"
        column.justify = "right" if column.header in ("epochs", "AP", "gain", "AP50") else "left"
    part = ""
    for place, row in enumerate(of.rows, 1):
        if row.part != part:
            part = row.part
            listed.add_row("", Text(part, "bold"))
        base, ap = of.baseline(row), row.published.get("AP")
        before = None if base is None else base.published.get("AP")
        gain = "" if ap is None or before is None else f"{ap - before:+.1f}"
        recipe = " + ".join([row.recipe or "-", *row.schemes])
        note = f"needs {row.missing}" if row.missing else "baseline" if row.baseline else ""
        scores = (number(ap, ".1f"), gain, number(row.published.get("AP50"), ".1f"))
        listed.add_row(str(place), Text(row.name), str(row.epochs or "-"), *scores, Text(recipe), Text(note))
    return listed


def _sheet(*columns: str, title: str | None = None) -> Table:
    from rich.box import SIMPLE_HEAD

    return Table(*columns, title=title and Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _show(as_data: object, listed: Table, as_json: bool) -> None:
    if as_json:
        print_json(as_data)
    else:
        console.print(listed)
