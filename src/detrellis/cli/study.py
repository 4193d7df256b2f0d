"""The verbs that train several recipes side by side: training schemes on your data, or a paper's
table, which it can also list with the published figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from detrellis import arguments
from detrellis.arguments import limits
from detrellis.cli.options import (
    AsJson,
    Device,
    Files,
    KeepPartial,
    Overrides,
    Scale,
    SkipBad,
    Track,
    console,
    grouped,
    print_json,
    progress_console,
    skips,
)
from detrellis.engine.console import number
from detrellis.errors import command
from detrellis.recipes import choose_recipe
from detrellis.recipes.tables import PaperTable, load_paper, papers

if TYPE_CHECKING:
    from detrellis.study.launch import Launcher
    from detrellis.study.plan import StudyPlan
    from detrellis.study.report import StudyReport

Seeds = Annotated[int, typer.Option(min=1, help="Runs of each row, with the seeds 0, 1, ...")]
Epochs = Annotated[
    int | None,
    typer.Option(
        **limits(arguments.Epochs),
        help="Length of every run, with --equal time the baseline's (default: the recipe's).",
    ),
]
Equal = Annotated[
    Literal["epochs", "time"],
    typer.Option(
        help=(
            "What all rows get: epochs, or time: slower ones get fewer epochs, after timing a few "
            "steps."
        )
    ),
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time.")]
LauncherOf = Annotated[
    Literal["local", "slurm", "ray"],
    typer.Option(
        "--launcher",
        help="Where runs run: processes here, jobs of Slurm, or tasks of a Ray cluster.",
    ),
]
LauncherOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--launcher-option",
        help="KEY=VALUE for each job, in sbatch's or ray's words. May be repeated.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        **limits(arguments.Threads),
        help="CPU threads of all runs together (default: all there are).",
    ),
]
Loading = Annotated[
    int,
    typer.Option(
        "--workers", **limits(arguments.Workers), help="Processes that load images, of each run."
    ),
]


@dataclass(frozen=True)
class TrialRuns:
    """The options of runs side by side: how long, how large, and on what they run."""

    scale: Scale = None
    epochs: Epochs = None
    jobs: Jobs = 1
    threads: Threads = None
    workers: Loading = 1
    skip_bad: SkipBad = False
    keep_partial: KeepPartial = False
    device: Device = None
    launcher: LauncherOf = "local"
    launcher_option: LauncherOptions = None
    track: Track = None
    as_json: AsJson = False

    def trackers(self) -> tuple[str, ...]:
        """The trackers that each run logs to."""
        from detrellis.engine.tracker_libraries import tracker_names

        return tracker_names(self.track or ())

    def find_launcher(self) -> Launcher:
        """What starts the runs."""
        from detrellis.study.cluster import find_launcher

        return find_launcher(self.launcher, self.launcher_option or (), self.threads)


@dataclass(frozen=True)
class Trials(TrialRuns):
    """The options of runs that are compared."""

    equal: Equal = "epochs"

    def settings(self, seeds: int) -> dict[str, Any]:
        """The settings that a plan takes."""
        settings = {name: getattr(self, name) for name in ("scale", "epochs", "equal")}
        settings["skip_bad"] = skips(self.skip_bad, self.keep_partial)
        return settings | {"seeds": range(seeds), "command": command(*sys.argv[1:])}

    def conduct(self, plan: StudyPlan, out: Path) -> None:
        """Train what is missing, and show the results; exits with 1 where a run did not finish."""
        from detrellis.study.conduct import conduct, to_dict

        names = ("jobs", "threads", "workers", "device")
        resources = {name: getattr(self, name) for name in names} | {
            "launcher": self.find_launcher()
        }
        resources |= {"track": self.trackers()}
        report = conduct(plan, out, **resources, console=progress_console(self.as_json))
        if self.as_json:
            print_json(to_dict(report))
        else:
            _show(report, out)
        raise typer.Exit(1 if report.unfinished else 0)


@grouped
def compare(
    *,
    recipe: Annotated[
        str, typer.Argument(help="Recipe that all rows share; see `detrellis recipes`.")
    ] = "small",
    schemes: Annotated[
        str | None,
        typer.Option(
            help=(
                "Rows, with commas between; the schemes of a row with +. The first is the "
                "baseline. Default: the recipe's own, and with each of stable, align=1 and group=3 "
                "that it can have."
            )
        ),
    ] = None,
    files: Files,
    override: Overrides = None,
    seeds: Seeds = 3,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the report.")] = Path("compare"),
    trials: Trials,
) -> None:
    """Which training schemes help on your data? Trains a recipe with each set of them,
    and reports gains and costs.

    A row has exactly the schemes that it names; the recipe's own are left out unless named. The
    same command again goes on with what was stopped. Exit code: 0 all runs finished, 1 some did
    not, 2 wrong use.

    Example: detrellis compare small --data my_data --schemes cdn,cdn+stable,cdn+align=1
    --epochs 12
    """
    choose_recipe(recipe, trials.scale, (), override or ())
    from detrellis.study.rows import plan_schemes

    plan = plan_schemes(
        recipe, schemes, files.source(), override=override or (), **trials.settings(seeds)
    )
    trials.conduct(plan, out)


@grouped
def reproduce(
    *,
    paper: Annotated[
        str | None, typer.Argument(help="Name of a paper (default: list them).")
    ] = None,
    table: Annotated[
        str | None, typer.Argument(help="Of its tables and figures (default: list them).")
    ] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="Only this row, by name or number. May be repeated.")
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="Only list rows and published figures.")
    ] = False,
    files: Files,
    boxes: Annotated[
        Path | None,
        typer.Option(help="Run whose reference boxes a row takes that has another data set's."),
    ] = None,
    seeds: Seeds = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder (default: reproduce/PAPER-TABLE).")
    ] = None,
    trials: Trials,
) -> None:
    """A paper's table: its rows with the published figures,
    or trained here beside them when data are given.

    Each row is compared with its baseline in that table. Rows that need what Detrellis lacks are
    listed and skipped.

    Example: detrellis reproduce align 3 --data my_data --scale tiny --epochs 12 --seeds 3
    """
    if paper is None or table is None or listing or (files.data is None and files.train is None):
        _show_published(paper, table, trials.as_json)
        return
    published = load_paper(paper)
    rows = published.table(table)
    if boxes is not None:
        rows = rows.with_boxes(boxes)
    # Torch takes seconds, and is not needed for what stands above
    from detrellis.study.rows import plan_table

    plan = plan_table(published, rows, files.source(), only=row or (), **trials.settings(seeds))
    trials.conduct(plan, out or Path("reproduce", f"{paper}-{table}"))


def _show(report: StudyReport, out: Path) -> None:
    from detrellis.study.tables import report_tables, rich_table
    from detrellis.study.words import caveats, recommend

    for sheet in report_tables(report):
        console.print(rich_table(sheet))
    for text in (recommend(report), *(f"- {text}" for text in caveats(report))):
        console.print(text)
    for outcome in report.unfinished:
        if outcome.log:
            console.print(f"\n{outcome.trial} failed:\n{outcome.log}")
    for name, why in report.plan.skipped.items():
        console.print(f"Left out: {name}: {why}")
    console.print(f"Report: {out / 'report.html'}")


def _show_published(paper: str | None, table: str | None, as_json: bool) -> None:
    """List all papers, the tables of one, or the rows of a table."""
    if paper is None:
        known = [load_paper(name) for name in papers()]
        listed = _sheet("paper", "title", "tables")
        for each in known:
            listed.add_row(each.name, Text(each.title), ", ".join(t.id for t in each.tables))
        data: Any = [
            {"name": p.name, "title": p.title, "tables": [t.id for t in p.tables]} for p in known
        ]
    elif table is None:
        one = load_paper(paper)
        listed = _sheet("table", "title", "rows", "can be run", title=one.title)
        for each_table in one.tables:
            runnable = sum(not row.missing for row in each_table.rows)
            listed.add_row(
                each_table.id, Text(each_table.title), str(len(each_table.rows)), str(runnable)
            )
        data = one.model_dump(mode="json")
    else:
        rows = load_paper(paper).table(table)
        data, listed = rows.model_dump(mode="json"), _rows(rows)
    if as_json:
        print_json(data)
    else:
        console.print(listed)


def _rows(of: PaperTable) -> Table:
    """A table of the published figures of each row, and whether it can be run."""
    listed = _sheet(
        "", "row", "epochs", "AP", "gain", "AP50", "recipe", "note", title=f"{of.title} ({of.data})"
    )
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
        note = f"--boxes of a run of {row.boxes}" if row.boxes else note
        scores = (number(ap, ".1f"), gain, number(row.published.get("AP50"), ".1f"))
        listed.add_row(
            str(place), Text(row.name), str(row.epochs or "-"), *scores, Text(recipe), Text(note)
        )
    return listed


def _sheet(*columns: str, title: str | None = None) -> Table:
    return Table(
        *columns,
        title=title and Text(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
