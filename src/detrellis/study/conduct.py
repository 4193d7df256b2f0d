"""A study from its plan to its report."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from detrellis.analysis.figures import DPI, need_matplotlib
from detrellis.atomic import Write, replace_files
from detrellis.study.figures import figures
from detrellis.study.pace import paced
from detrellis.study.page import page
from detrellis.study.plan import Plan
from detrellis.study.report import Report, report
from detrellis.study.run import How, run
from detrellis.study.words import caveats, recommend
from detrellis.terminal import Terminal


def conduct(plan: Plan, out: str | Path, how: How | None = None, console: Console | None = None) -> Report:
    """Train what is missing below `out`, and write the report there: `report.html`, `.json`, figures.

    Raises `UserError` before anything is trained where another study is in the folder, or matplotlib is missing.
    """
    folder = Path(out)
    how, console = how or How(), console or Terminal()
    need_matplotlib()
    if plan.pace is not None:
        plan = paced(plan, folder, how, console.print)
    plan.begin(folder)
    found = report(plan, run(plan, folder, how, console))
    save(found, folder)
    return found


def to_dict(found: Report) -> dict[str, Any]:
    """A report as JSON holds it; recipes stand in `plan.json`."""
    plan = {name: getattr(found.plan, name) for name in ("title", "command", "skip_bad")}
    plan |= {"seeds": list(found.plan.seeds), "data": dict(found.plan.data), "skipped": dict(found.plan.skipped)}
    unfinished = [{"trial": str(o.trial), "state": o.state, "log": o.log} for o in found.unfinished]
    words = {"recommendation": recommend(found), "caveats": caveats(found)}
    return {"study": plan, **words, "rows": [line.to_dict() for line in found.lines], "unfinished": unfinished}


def save(found: Report, out: Path) -> None:
    """Write `OUT/report.json`, `OUT/report.html` and the figures."""
    drawn = figures(found)
    texts = {"report.json": json.dumps(to_dict(found), indent=1), "report.html": page(found, drawn)}
    files: list[tuple[Path, Write]] = []
    for name, text in texts.items():
        files.append((out / name, partial(Path.write_text, data=text, encoding="utf-8")))
    for name, (figure, _) in drawn.items():
        files.append((out / f"{name}.png", partial(figure.savefig, format="png", dpi=DPI)))
    replace_files(*files)
