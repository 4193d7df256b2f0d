"""A study from its plan to its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from detrellis.analysis.figures import DPI, need_matplotlib
from detrellis.atomic import Write, replace_files
from detrellis.errors import UserError
from detrellis.folders import held
from detrellis.study.figures import figures
from detrellis.study.launch import Launcher, Local
from detrellis.study.pace import paced
from detrellis.study.page import page
from detrellis.study.plan import StudyPlan
from detrellis.study.report import StudyReport, read_report
from detrellis.study.run import Resources, run
from detrellis.study.words import caveats, recommend
from detrellis.terminal import Terminal


def conduct(
    plan: StudyPlan,
    out: str | Path,
    *,
    jobs: int = 1,
    threads: int | None = None,
    workers: int = 1,
    device: str | None = None,
    launcher: Launcher | None = None,
    track: Sequence[str] = (),
    console: Console | None = None,
) -> StudyReport:
    """Train what is missing below `out`, and write the report there:
    `report.html`, `.json`, figures.

    `jobs` trials run at a time, on `threads` CPU threads together (default: `OMP_NUM_THREADS` each,
    or all cores), each with `workers` processes that load images, and on the devices of `device`,
    which are separated by commas. `launcher` starts them as jobs of a cluster instead
    (`find_launcher`), and `track` names trackers that each run logs to. Raises `UserError` before
    anything is trained where another study is in the folder, matplotlib is missing, or equal time
    is asked for on machines that are not timed.
    """
    resources = Resources(jobs, threads, workers, device, launcher or Local(), tuple(track))
    folder, console = Path(out), console or Terminal()
    need_matplotlib()
    if plan.pace is not None and not resources.launcher.here:
        raise UserError(
            "--equal time times steps on this machine, and the runs are jobs of others",
            "Take --equal epochs, or start the whole study as one job with --launcher local.",
        )
    with held(folder, new=True):
        if plan.pace is not None:
            plan = paced(plan, folder, resources, console.print)
        plan.begin(folder)
        report = read_report(plan, run(plan, folder, resources, console))
        save(report, folder)
    return report


def to_dict(report: StudyReport) -> dict[str, Any]:
    """A report as JSON holds it; recipes stand in `plan.json`."""
    plan = {name: getattr(report.plan, name) for name in ("title", "command", "skip_bad")}
    plan |= {
        "seeds": list(report.plan.seeds),
        "data": dict(report.plan.data),
        "skipped": dict(report.plan.skipped),
    }
    unfinished = [
        {"trial": str(o.trial), "state": o.state, "log": o.log} for o in report.unfinished
    ]
    words = {"recommendation": recommend(report), "caveats": caveats(report)}
    return {
        "study": plan,
        **words,
        "rows": [row.to_dict() for row in report.rows],
        "unfinished": unfinished,
    }


def save(report: StudyReport, out: Path) -> None:
    """Write `OUT/report.json`, `OUT/report.html` and the figures."""
    drawn = figures(report)
    texts = {
        "report.json": json.dumps(to_dict(report), indent=1),
        "report.html": page(report, drawn, out),
    }
    files: list[tuple[Path, Write]] = []
    for name, text in texts.items():
        files.append((out / name, partial(Path.write_text, data=text, encoding="utf-8")))
    for name, (figure, _) in drawn.items():
        files.append((out / f"{name}.png", partial(figure.savefig, format="png", dpi=DPI)))
    replace_files(*files)
