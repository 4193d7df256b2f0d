"""A study from its plan to its report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from detrellis.analysis.figures import need_matplotlib
from detrellis.study.pace import paced
from detrellis.study.plan import Plan
from detrellis.study.report import Report, report
from detrellis.study.run import How, run
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
    found.save(folder)
    return found
