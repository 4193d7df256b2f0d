"""The report as one HTML page that needs no other file, no script and no network; light or dark as the reader's system
is."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Mapping
from html import escape
from typing import Any

from detrellis.analysis.figures import INK, Figure
from detrellis.engine.evaluate import NMS
from detrellis.study.plan import changes
from detrellis.study.report import StudyReport
from detrellis.study.tables import ReportTable, report_tables
from detrellis.study.words import caveats, minutes, recommend
from detrellis.version import __version__

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
.wide { overflow-x: auto; margin-bottom: 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; color: var(--soft); padding: 0 0 .3rem; }
th, td { padding: .35rem .7rem .35rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
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
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
"""


def page(report: StudyReport, drawn: Mapping[str, tuple[Figure, str]]) -> str:
    """The report as a whole HTML page; `drawn` is what `figures` returned."""
    title = escape(report.plan.title)
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="answer">{escape(recommend(report))}</p>',
        *(_table(sheet, report.plan.baselines) for sheet in report_tables(report)),
        *(_figure(name, figure, caption) for name, (figure, caption) in drawn.items()),
        f"<h2>What to keep in mind</h2>\n{_list(map(escape, caveats(report)))}",
        f"<h2>What was run</h2>\n{_facts(report)}",
        _rows(report),
        *_missing(report),
        f"<h2>How the numbers are computed</h2>\n{_list(map(escape, _definitions(report)))}",
        f'<p class="soft">Written by Detrellis {escape(__version__)}. As JSON: report.json.</p>',
    ]
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"\n<title>{title}</title>\n<style>{STYLE}</style>"
    body = "\n".join(part for part in parts if part)
    whole = f"<head>\n{head}\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>"
    return f'<!DOCTYPE html>\n<html lang="en">\n{whole}\n</html>\n'


def _table(sheet: ReportTable, baselines: Collection[str]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in sheet.columns)
    rows = []
    for row in sheet.rows:
        mark = ' class="baseline"' if row[0] in baselines else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        rows.append(f"<tr{mark}>{cells}</tr>")
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>"
    return f'<div class="wide"><table>\n<caption>{escape(sheet.title)}</caption>\n{body}\n</table></div>'


def _figure(name: str, figure: Figure, caption: str) -> str:
    drawing = f'<div class="wide"><div class="figure">{svg(name, figure, caption)}</div></div>'
    return f"<figure>\n{drawing}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def svg(name: str, figure: Figure, alt: str) -> str:
    """The figure as an element whose ink has the colour of the text around it; `name` makes its ids its own."""
    from matplotlib import rc_context

    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    size = re.search(r'viewBox="[^"]*"', drawing)
    assert size is not None
    inner = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", drawing[drawing.index(">") + 1 :])
    for ink in (INK, "#000000"):
        inner = inner.replace(ink, "currentColor")
    return f'<svg role="img" aria-label="{escape(alt)}" {size[0]} fill="currentColor">{inner}'


def _facts(report: StudyReport) -> str:
    plan = report.plan
    data = "; ".join(f"{split}: {files['annotations']}" for split, files in plan.data["splits"].items())
    epochs = sorted({row.recipe.schedule.epochs for row in plan.rows})
    machines = dict.fromkeys(_machine(run.machine) for row in report.rows for run in row.runs)
    facts = {
        "Data": data + (" (bad records left out)" if plan.skip_bad else ""),
        "Seeds": ", ".join(map(str, plan.seeds)),
        "Epochs": " to ".join(map(str, dict.fromkeys((epochs[0], epochs[-1])))),
        "Machine": "; ".join(machines) or "-",
    }
    listed = "\n".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<pre>{escape(plan.command)}</pre>\n<dl>\n{listed}\n</dl>"


def _machine(machine: Mapping[str, Any]) -> str:
    device, threads, jobs, torch = (machine.get(name) for name in ("device", "threads", "jobs", "torch"))
    return f"{device}, {threads} threads, {jobs} at a time, torch {torch}"


def _rows(report: StudyReport) -> str:
    """A section that lists how each row's recipe differs from its baseline's."""
    parts = []
    for row in report.plan.rows:
        base = report.plan.row(row.against or row.name)
        one, other = (r.recipe.model_dump(mode="json", exclude={"name", "about"}) for r in (base, row))
        differing = [text.strip() for text in changes("", one, other)]
        note = f"<p>{escape(row.note)}</p>" if row.note else ""
        what = _list(f"<code>{escape(text)}</code>" for text in differing) if differing else ""
        same = "" if differing else f"<p>The recipe {escape(row.recipe.name)}.</p>"
        against = "" if row.against is None else f" against {escape(row.against)}"
        parts.append(f"<details><summary>{escape(row.name)}{against}</summary>{note}{same}{what}</details>")
    where = '<p class="soft">Every recipe stands whole in plan.json.</p>'
    return "<h2>What the rows change</h2>\n" + "\n".join(parts) + where


def _missing(report: StudyReport) -> list[str]:
    parts = []
    if report.plan.skipped:
        listed = (f"{escape(name)}: {escape(why)}" for name, why in report.plan.skipped.items())
        parts.append(f"<h2>Rows that were left out</h2>\n{_list(listed)}")
    for outcome in report.unfinished:
        if outcome.log:
            parts.append(f"<h2>{escape(str(outcome.trial))} failed</h2>\n<pre>{escape(outcome.log)}</pre>")
    return parts


def _definitions(report: StudyReport) -> list[str]:
    base = report.plan.baseline or "its baseline"
    return [
        "AP is COCO's box AP on the validation split, in percent, of the averaged weights where the recipe averages.",
        f"Gain: the row's AP after the last epoch minus that of {base} with the same seed, and the mean over seeds. "
        "With the same seed the order of the images and their augmentation are the same, and so are the first weights "
        "of the same network.",
        "In brackets: the 95 % t-interval of that mean over seeds. A gain is called one where the interval is above 0.",
        f"Without duplicates: of all queries and classes of the last weights, those are dropped first whose IoU with a "
        f"better one of the class is above {NMS}.",
        "Step: time of a training step in the epoch in the middle, without evaluation; mean over seeds.",
        "Memory: most that the process has had, or on a GPU most that was allocated there; the highest of the seeds.",
        f"Epochs to the AP of {base}: the first epoch after which the mean AP is what {base} ends with.",
        _same_time(report),
    ]


def _same_time(report: StudyReport) -> str:
    if report.plan.pace is not None:
        return "Epochs: of each row as many as take the time of its baseline, by the paces in plan.json."
    budgets = {row.budget for row in report.rows}
    whose = f", {minutes(budgets.pop())} of training" if len(budgets) == 1 else ", of those with one baseline"
    return f"AP in the same time: mean AP of the last epoch within the time of the fastest row{whose}."


def _list(items: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{item}</li>" for item in items) + "\n</ul>"
