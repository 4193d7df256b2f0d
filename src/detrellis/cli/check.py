"""`detrellis check`: what is wrong with a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detrellis.arguments import Threads, limits
from detrellis.cli.options import (
    AsJson,
    Files,
    Overrides,
    Scale,
    Schemes,
    console,
    errors,
    grouped,
    print_json,
)
from detrellis.errors import UserError
from detrellis.recipes import Recipe, choose_recipe

if TYPE_CHECKING:
    from detrellis.data.doctor.boxes import Capacity
    from detrellis.data.layout import DataSource


Show = Annotated[
    int | None,
    typer.Option(
        min=1, max=100, help="Draw so many pictures as --recipe (default: small) trains on them."
    ),
]


@grouped
def check(
    *,
    files: Files,
    fast: Annotated[bool, typer.Option("--fast", help="Do not decode the images.")] = False,
    fix: Annotated[
        Path | None, typer.Option(help="Write a clean copy of the annotations into this folder.")
    ] = None,
    keep_partial: Annotated[
        bool, typer.Option("--keep-partial", help="With --fix: keep images that lose an object.")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe to train: has it queries enough for each image?")
    ] = None,
    scale: Scale = None,
    scheme: Schemes = None,
    override: Overrides = None,
    show: Show = None,
    workers: Annotated[
        int | None,
        typer.Option(**limits(Threads), help="Threads that decode (default: one a core)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a data set before anyone trains on it. Exit code: 0 clean, 1 errors found, 2 wrong use.

    Example: detrellis check --data my_data --fix my_data_clean
    """
    from detrellis.data.doctor.check import check as check_source
    from detrellis.data.doctor.fix import clean_folder
    from detrellis.data.doctor.fix import fix as fix_source

    if keep_partial and fix is None:
        raise UserError(
            "--keep-partial without --fix", "Add --fix OUT: only then anything is left out."
        )
    chosen = _recipe_to_train(recipe or ("small" if show else None), scale, scheme, override)
    capacity = None if chosen is None else _capacity(chosen)
    source = files.source()
    if fix is not None:
        clean_folder(source, fix)
    report = check_source(
        source, fast=fast, progress=not as_json, workers=workers, capacity=capacity
    )
    fixed = None if fix is None else fix_source(source, report, fix, keep_partial)
    if as_json:
        print_json(
            report.to_dict()
            | ({} if fixed is None else {"fixed": str(fixed.out), "changes": fixed.changes})
        )
    else:
        console.print(report.table())
        if fixed is not None:
            console.print(fixed.text())
    if show and chosen is not None:
        _show_samples(chosen, source, show, report.exit_code)
    raise typer.Exit(report.exit_code)


def _recipe_to_train(
    recipe: str | None, scale: str | None, scheme: list[str] | None, override: list[str] | None
) -> Recipe | None:
    """The recipe that a data set is checked for; None without one."""
    if recipe is not None:
        return choose_recipe(recipe, "tiny" if scale else None, scheme or (), override or ())
    if scale or scheme or override:
        raise UserError(
            "--scale, --scheme and -o without --recipe", "Add --recipe NAME, the one to train."
        )
    return None


def _capacity(recipe: Recipe) -> Capacity:
    """The capacity that `check` compares the fullest image with."""
    from detrellis.engine.capacity import capacity

    return capacity(recipe)


def _show_samples(recipe: Recipe, source: DataSource, count: int, exit_code: int) -> None:
    """Draw what training sees; nobody can train on a data set with errors."""
    if exit_code:
        errors.say(
            "Nothing is drawn before the errors are put right: --fix OUT, then check --data "
            "OUT --show."
        )
        return
    from detrellis.api import draw_samples

    errors.say("What training sees: ", (str(draw_samples(recipe, source, count)), "bold"))
