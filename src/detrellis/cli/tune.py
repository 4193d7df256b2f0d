"""The verb that searches a recipe's fields."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from detrellis import arguments
from detrellis.arguments import limits
from detrellis.cli.options import (
    Files,
    Overrides,
    console,
    grouped,
    print_json,
    progress_console,
    skips,
)
from detrellis.cli.study import TrialRuns
from detrellis.engine.console import number
from detrellis.errors import command
from detrellis.recipes import choose_recipe

if TYPE_CHECKING:
    from detrellis.study.tune import Candidate, Tuner

MEANING = (
    "Values of a field: LOW..HIGH, LOW..HIGH:log, or A,B,C; of the field schemes: rows as in "
    "compare. Repeat it."
)


@grouped
def tune(
    *,
    recipe: Annotated[
        str, typer.Argument(help="Recipe to change; see `detrellis recipes`.")
    ] = "small",
    search: Annotated[list[str] | None, typer.Option(help=MEANING)] = None,
    files: Files,
    override: Overrides = None,
    trials: Annotated[
        int, typer.Option(min=2, help="Runs in all; the first is the recipe as it is.")
    ] = 20,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune/--no-prune", help="Stop trials that are below the median after as many epochs."
        ),
    ] = True,
    seed: Annotated[
        int, typer.Option(**limits(arguments.Seed), help="Decides the runs and what is tried.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of tune.json.")] = Path("tune"),
    runs: TrialRuns,
) -> None:
    """Which settings are best on your data? Searches fields of a recipe with optuna,
    by AP on the validation split.

    The same command again goes on with what was stopped, also with more --trials. The best of many
    trials is flattered by the images that chose it: train it with other seeds before you believe
    the gain. Exit code: 0 all trials ended, 1 some failed or were stopped, 2 wrong use.

    Example: detrellis tune small --data my_data --search optim.lr=3e-4..3e-3:log --search
    schemes=none,align
    """
    chosen = choose_recipe(recipe, runs.scale, (), override or ())
    if runs.epochs is not None:
        chosen = chosen.override(f"schedule.epochs={runs.epochs}")
    from detrellis.study.rows import check_row, count_classes
    from detrellis.study.run import Conditions, Resources
    from detrellis.study.space import parse_space
    from detrellis.study.tune import Search, tune

    space = parse_space(search or (), chosen)
    source, skip_bad = files.source(), skips(runs.skip_bad, runs.keep_partial)
    check_row(chosen, count_classes(source, skip_bad))
    conditions = Conditions(source.to_dict(), skip_bad)
    wanted = Search(chosen, space, conditions, trials, seed, prune, command(*sys.argv[1:]))
    resources = Resources(
        runs.jobs, runs.threads, runs.workers, runs.device, runs.find_launcher(), runs.trackers()
    )
    tuner = tune(wanted, out, resources, progress_console(runs.as_json))
    if runs.as_json:
        print_json([candidate.to_dict() for candidate in tuner.candidates])
    else:
        _show(tuner, recipe, runs, override or [])
    raise typer.Exit(1 if tuner.unfinished() else 0)


def _show(tuner: Tuner, recipe: str, runs: TrialRuns, override: list[str]) -> None:
    """The trials, best first; what explains their scores;
    and the command that trains the best one.
    """
    from detrellis.study.tune import AS_IT_IS, best_of, options
    from detrellis.study.words import HARDLY

    console.print(_table(tuner))
    for candidate in tuner.candidates:
        if why := candidate.to_dict().get("why"):
            console.print(f"trial {candidate.number}, {candidate.state}: {why}", markup=False)
    if importances := tuner.importances():
        console.print(
            "Share of the scores' variation: "
            + ", ".join(f"{name} {part:.0%}" for name, part in importances.items())
        )
    if left := tuner.unfinished():
        console.print(f"Trials that have not ended: {left}. The same command goes on.")
    best, base = best_of(tuner), tuner.candidates[0]
    if best is None or base.ap is None or best.ap is None:
        return
    if best.ap < HARDLY:
        console.print(
            f"No trial has learned more than AP {best.ap:.1f}, so that chance decides. Give them "
            "more --epochs."
        )
        return
    if best is base:
        console.print(
            f"Nothing that was tried is better than the recipe {AS_IT_IS}: AP {base.ap:.1f}."
        )
        return
    assert best.outcome is not None
    console.print(
        f"Best: trial {best.number}, AP {best.ap:.1f}; the recipe {AS_IT_IS}: {base.ap:.1f}. The "
        f"best of {len(tuner.candidates)} is flattered by the images that chose it: train both "
        "with other seeds."
    )
    scale = [] if runs.scale is None else ["--scale", runs.scale]
    before = [word for text in override for word in ("-o", text)]
    epochs = ["--epochs", tuner.search.recipe.schedule.epochs]
    data = ["--seed", tuner.search.seed + 1, "--data", "YOUR_DATA"]
    console.say(
        "Next: ",
        (
            command("train", recipe, *scale, *data, *epochs, *before, *options(tuner.search, best)),
            "bold",
        ),
    )


def _table(tuner: Tuner) -> Table:
    fields = [dimension.field for dimension in tuner.search.space]
    table = Table("trial", "AP", "state", "epochs", *fields, box=SIMPLE_HEAD)
    for candidate in sorted(tuner.candidates, key=_rank):
        values = [str(candidate.values.get(name, "")) for name in fields]
        epochs = str(max(candidate.curve, default=0))
        ap = number(candidate.ap, ".1f")
        table.add_row(
            str(candidate.number), ap, candidate.state, epochs, *(Text(value) for value in values)
        )
    return table


def _rank(candidate: Candidate) -> tuple[bool, float]:
    """Finished trials first, the best on top."""
    return candidate.state != "finished", -(candidate.ap or 0.0)
