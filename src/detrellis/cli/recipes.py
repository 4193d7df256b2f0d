"""The verbs about recipes: which there are, and what they cost."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from detrellis.arguments import Classes, Runs, Threads, limits
from detrellis.cli.options import (
    AsJson,
    Device,
    Half,
    Overrides,
    Scale,
    Schemes,
    console,
    print_json,
)
from detrellis.recipes import RECIPES, choose_recipe


def info(
    recipe: Annotated[str, typer.Argument(help="Recipe name.")],
    classes: Annotated[int, typer.Option(**limits(Classes), help="Number of classes.")] = 80,
    scale: Scale = None,
    scheme: Schemes = None,
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, multiply-adds and training schemes of a recipe.

    Example: detrellis info dino-r50 --classes 91
    """
    chosen = choose_recipe(recipe, scale, scheme or (), override or ())
    from detrellis import api

    costs = api.info(chosen, classes=classes)
    if as_json:
        print_json(costs.to_dict())
        return
    height, width = costs.image_size
    table = Table("", costs.recipe, title=Text(costs.about), title_justify="left")
    table.add_row("parameters", f"{costs.parameters:,}")
    table.add_row("of these in the backbone", f"{costs.parameters_backbone:,}")
    table.add_row("of all trained", f"{costs.parameters_trainable:,}")
    table.add_row(f"multiply-adds at {width}x{height}", f"{costs.gflops} GFLOPs")
    table.add_row("queries", str(costs.queries))
    for s in costs.schemes:
        table.add_row(
            f"scheme {s.name}, training only",
            f"+{s.parameters:,} parameters, up to +{s.queries} queries",
        )
    console.print(table)


def bench(
    recipe: Annotated[str, typer.Argument(help="Recipe name.")],
    classes: Annotated[int, typer.Option(**limits(Classes), help="Number of classes.")] = 80,
    batch_sizes: Annotated[str, typer.Option(help="Images at a time, several with commas.")] = "1",
    size: Annotated[
        str | None, typer.Option(help="Short side, or HEIGHTxWIDTH (default: the recipe's).")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(**limits(Threads), help="CPU threads (default: torch's).")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="With torch.compile, and without beside it.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Time a training step instead of inference.")
    ] = False,
    runs: Annotated[
        int, typer.Option(**limits(Runs), help="Timed passes, of which the median counts.")
    ] = 10,
    scale: Scale = None,
    scheme: Schemes = None,
    override: Overrides = None,
    device: Device = None,
    half: Half = False,
    as_json: AsJson = False,
) -> None:
    """Latency and throughput of a recipe here: inference, or a training step, with random weights.

    Example: detrellis bench dino-r50 --size 640x640 --batch-sizes 1,2 --threads 1
    """
    chosen = choose_recipe(recipe, scale, scheme or (), override or ())
    from detrellis import api

    result = api.bench(
        chosen,
        classes=classes,
        batch_sizes=batch_sizes,
        size=size,
        threads=threads,
        compiled=compiled,
        train=train,
        runs=runs,
        device=device,
        half=half,
    )
    if as_json:
        print_json(result.to_dict())
        return
    console.print(result.about())
    console.print(result.table())
    if verdict := result.verdict():
        console.print(verdict)


def recipes(as_json: AsJson = False) -> None:
    """List the recipes.

    Example: detrellis recipes
    """
    known = [make() for make in RECIPES.values()]
    if as_json:
        print_json([{"name": r.name, "about": r.about} for r in known])
        return
    table = Table("recipe", "what it is", "epochs", "schemes")
    for r in known:
        schemes = [name for name, value in r.schemes if value is not None]
        table.add_row(r.name, Text(r.about), str(r.schedule.epochs), ", ".join(schemes) or "-")
    console.print(table)
