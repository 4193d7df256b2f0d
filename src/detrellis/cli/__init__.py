"""The command line: one verb a function, each with an example, and a file for each kind.
Heavy imports wait until a verb needs them.
"""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from detrellis.cli.analyze import analyze
from detrellis.cli.check import check
from detrellis.cli.entry import start
from detrellis.cli.evaluate import evaluate
from detrellis.cli.export import convert, export
from detrellis.cli.paragraphs import join_lines
from detrellis.cli.predict import predict
from detrellis.cli.recipes import bench, info, recipes
from detrellis.cli.serve import push, serve
from detrellis.cli.study import compare, reproduce
from detrellis.cli.train import demo, train
from detrellis.cli.tune import tune
from detrellis.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train DETR-family object detectors on your own data. Start with [bold]detrellis "
        "demo[/bold]."
    ),
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for verb in (demo, check, train):
    app.command()(verb)
app.command(name="eval")(evaluate)
for verb in (
    *(convert, export, predict, serve, push),
    *(info, bench, recipes, compare, reproduce, tune),
):
    app.command()(verb)
app.add_typer(analyze, name="analyze")
join_lines(app)


def main() -> NoReturn:
    """Run the command line; `__main__.py` is what the shell calls."""
    start(app)
