"""HTML pages that need no other file, no script and no network;
light or dark as the reader's system is.

Whatever text is given is escaped here. What is called `inner` is HTML already.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1d1f21; --soft: #5c6268; --line: #d9dcdf; --paper: #fff; --box: #f3f6f8;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --soft: #9aa1a8; --line: #3a4046; --paper: #16191c;
  --box: #20252a; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.answer { background: var(--box); border-left: .3rem solid var(--accent); padding: .8rem 1rem; font-size: 1.05rem; }
.wide { overflow-x: auto; margin-bottom: 1.2rem; background:
  linear-gradient(to right, var(--paper) 40%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, var(--line), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--line), transparent) right / .8rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; color: var(--soft); padding: 0 0 .3rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 2rem); }
th, td { padding: .35rem .7rem .35rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .words { text-align: left; }
td.words { white-space: normal; min-width: 10rem; }
thead th { white-space: normal; vertical-align: bottom; color: var(--soft); font-weight: 600; font-size: .875rem; }
tr.baseline { background: var(--box); }
.figure { min-width: 34rem; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption, .soft { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; }
pre, code { font: .875rem/1.45 ui-monospace, monospace; }
pre { background: var(--box); padding: .7rem .9rem; overflow-x: auto; }
li { margin: .3rem 0; }
details { margin: 1rem 0; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.pair, .gallery { display: grid; gap: 0 1.2rem; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.pair .figure { min-width: 0; }
.gallery { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.gallery figcaption { overflow-wrap: anywhere; }
.gallery figure { margin: .4rem 0; }
img { max-width: 100%; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .2rem 0; font-size: .875rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; }
@media (max-width: 34rem) { td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; } }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
"""


def document(title: str, inner: Iterable[str]) -> str:
    """A whole page, of parts of which some may be empty."""
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"\n<title>{escape(title)}</title>\n<style>{STYLE}</style>"
    body = "\n".join(part for part in inner if part)
    whole = f"<head>\n{head}\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>"
    return f'<!DOCTYPE html>\n<html lang="en">\n{whole}\n</html>\n'


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], marked: Collection[str] = ()
) -> str:
    """A table that scrolls by itself where it is too wide, its words to the left and its numbers
    to the right; rows are `marked` by their first cell.
    """
    rows = list(rows)
    kinds = [
        ' class="words"' if _words(row[i] for row in rows) else "" for i in range(len(columns))
    ]
    head = "".join(
        f'<th scope="col"{kind}>{escape(column)}</th>'
        for kind, column in zip(kinds, columns, strict=True)
    )
    lines = []
    for row in rows:
        mark = ' class="baseline"' if row[0] in marked else ""
        cells = "".join(
            f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)
        )
        lines.append(f"<tr{mark}>{cells}</tr>")
    caption = f"<caption><span>{escape(title)}</span></caption>"
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    return f'<div class="wide"><table>\n{caption}\n{body}\n</table></div>'


def _words(cells: Iterable[str]) -> bool:
    """Whether a column holds words: something other than numbers, dashes, and what is empty."""
    return any(re.match(r"[^\W\d]|\(", cell) for cell in cells)


def figure(inner: str, caption: str) -> str:
    """A drawing with its caption."""
    drawing = f'<div class="wide"><div class="figure">{inner}</div></div>'
    return f"<figure>\n{drawing}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def facts(values: Mapping[str, str]) -> str:
    """Names and what they are."""
    listed = "\n".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in values.items()
    )
    return f"<dl>\n{listed}\n</dl>"


def bullets(inner: Iterable[str]) -> str:
    """A list."""
    return "<ul>\n" + "\n".join(f"<li>{item}</li>" for item in inner) + "\n</ul>"
