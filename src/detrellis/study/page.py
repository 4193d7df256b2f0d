"""The report as one HTML page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from detrellis.analysis.figures import INK, Figure
from detrellis.engine.evaluate import NMS
from detrellis.study.plan import changes
from detrellis.study.report import StudyReport
from detrellis.study.tables import report_tables
from detrellis.study.words import caveats, minutes, recommend
from detrellis.version import __version__
from detrellis.webpage import bullets, document, facts, figure, table

REPORT = "report.html"  # of a run: what it gets wrong


def page(report: StudyReport, drawn: Mapping[str, tuple[Figure, str]], out: Path) -> str:
    """The report as a whole HTML page in the folder `out` of the runs;
    `drawn` is what `figures` returned.
    """
    title = escape(report.plan.title)
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="answer">{escape(recommend(report))}</p>',
        *(table(*sheet, report.plan.baselines) for sheet in report_tables(report)),
        *(
            figure(svg(name, drawing, caption), caption)
            for name, (drawing, caption) in drawn.items()
        ),
        f"<h2>What to keep in mind</h2>\n{bullets(map(escape, caveats(report)))}",
        f"<h2>What was run</h2>\n{_facts(report)}",
        _rows(report, out),
        *_missing(report),
        f"<h2>How the numbers are computed</h2>\n{bullets(map(escape, _definitions(report)))}",
        f'<p class="soft">Written by Detrellis {escape(__version__)}. As JSON: report.json.</p>',
    ]
    return document(report.plan.title, parts)


def svg(name: str, drawn: Figure, alt: str) -> str:
    """The figure as an element whose ink has the colour of the text around it;
    `name` makes its ids its own.
    """
    from matplotlib import rc_context

    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": name}):
        drawn.savefig(text, format="svg", transparent=True, metadata=nothing)
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
    data = "; ".join(
        f"{split}: {files['annotations']}" for split, files in plan.data["splits"].items()
    )
    epochs = sorted({row.recipe.schedule.epochs for row in plan.rows})
    machines = dict.fromkeys(_machine(run.machine) for row in report.rows for run in row.runs)
    values = {
        "Data": data + (" (bad records left out)" if plan.skip_bad else ""),
        "Seeds": ", ".join(map(str, plan.seeds)),
        "Epochs": " to ".join(map(str, dict.fromkeys((epochs[0], epochs[-1])))),
        "Machine": "; ".join(machines) or "-",
    }
    return f"<pre>{escape(plan.command)}</pre>\n{facts(values)}"


def _machine(machine: Mapping[str, Any]) -> str:
    device, threads, jobs, torch = (
        machine.get(name) for name in ("device", "threads", "jobs", "torch")
    )
    return f"{device}, {threads} threads, {jobs} at a time, torch {torch}"


def _rows(report: StudyReport, out: Path) -> str:
    """A section that lists how each row's recipe differs from its baseline's,
    with links to what its runs get wrong.
    """
    parts = []
    for row in report.plan.rows:
        base = report.plan.row(row.against or row.name)
        one, other = (
            r.recipe.model_dump(mode="json", exclude={"name", "about"}) for r in (base, row)
        )
        differing = [text.strip() for text in changes("", one, other)]
        note = f"<p>{escape(row.note)}</p>" if row.note else ""
        what = bullets(f"<code>{escape(text)}</code>" for text in differing) if differing else ""
        same = "" if differing else f"<p>The recipe {escape(row.recipe.name)}.</p>"
        against = "" if row.against is None else f" against {escape(row.against)}"
        inner = f"{note}{same}{what}{_links(report, row.name, out)}"
        parts.append(f"<details><summary>{escape(row.name)}{against}</summary>{inner}</details>")
    where = '<p class="soft">Every recipe stands whole in plan.json.</p>'
    return "<h2>What the rows change</h2>\n" + "\n".join(parts) + where


def _links(report: StudyReport, row: str, out: Path) -> str:
    """Links to the reports of a row's runs, as far as they have one."""
    links = []
    for trial in report.plan.trials():
        path = trial.folder(Path()) / REPORT
        if trial.row == row and (out / path).is_file():
            links.append(f'<a href="{escape(quote(path.as_posix()))}">seed {trial.seed}</a>')
    return f"<p>What is wrong with it: {', '.join(links)}.</p>" if links else ""


def _missing(report: StudyReport) -> list[str]:
    parts = []
    if report.plan.skipped:
        listed = (f"{escape(name)}: {escape(why)}" for name, why in report.plan.skipped.items())
        parts.append(f"<h2>Rows that were left out</h2>\n{bullets(listed)}")
    for outcome in report.unfinished:
        if outcome.log:
            parts.append(
                f"<h2>{escape(str(outcome.trial))} failed</h2>\n<pre>{escape(outcome.log)}</pre>"
            )
    return parts


def _definitions(report: StudyReport) -> list[str]:
    base = report.plan.baseline or "its baseline"
    return [
        "AP is COCO's box AP on the validation split, in percent, of the averaged weights where "
        "the recipe averages.",
        f"Gain: the row's AP after the last epoch minus that of {base} with the same seed, and "
        "the mean over seeds. With the same seed the order of the images and their augmentation "
        "are the same, and so are the first weights of the same network.",
        "In brackets: the 95 % t-interval of that mean over seeds. A gain is called one where "
        "the interval is above 0.",
        "Without duplicates: of all queries and classes of the last weights, those are dropped "
        f"first whose IoU with a better one of the class is above {NMS}.",
        "Step: time of a training step in the epoch in the middle, without evaluation; mean "
        "over seeds.",
        "Memory: most that the process has had, or on a GPU most that was allocated there; the "
        "highest of the seeds.",
        f"Epochs to the AP of {base}: the first epoch after which the mean AP is what {base} "
        "ends with.",
        _same_time(report),
    ]


def _same_time(report: StudyReport) -> str:
    if report.plan.pace is not None:
        return (
            "Epochs: of each row as many as take the time of its baseline, by the paces in "
            "plan.json."
        )
    budgets = {row.budget for row in report.rows}
    whose = (
        f", {minutes(budgets.pop())} of training"
        if len(budgets) == 1
        else ", of those with one baseline"
    )
    return (
        f"AP in the same time: mean AP of the last epoch within the time of the fastest row{whose}."
    )
