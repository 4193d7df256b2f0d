"""`detrellis train`, and `detrellis demo`, which makes the data it trains on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrellis.arguments import Epochs, Seed, limits
from detrellis.cli.options import (
    AsJson,
    AutoBatch,
    Boxes,
    Device,
    EpochsOrAuto,
    Files,
    KeepPartial,
    Overrides,
    RecipeName,
    Scale,
    Schemes,
    SkipBad,
    Track,
    Weights,
    Workers,
    console,
    grouped,
    print_json,
    progress_console,
    skips,
)
from detrellis.errors import UserError, command
from detrellis.recipes import choose_recipe

if TYPE_CHECKING:
    from detrellis.engine.outcome import TrainResult


def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, run and pictures.")] = Path("demo"),
    epochs: Annotated[
        int | None, typer.Option(**limits(Epochs), help="Fewer for a quick look.")
    ] = None,
    seed: Annotated[
        int, typer.Option(**limits(Seed), help="Decides the data, the weights and their order.")
    ] = 0,
    masks: Annotated[bool, typer.Option("--masks", help="Find the objects' masks, too.")] = False,
) -> None:
    """Make a data set, check it, train on it, evaluate, and draw the result:
    three to eight minutes on two CPU cores.

    Example: detrellis demo
    """
    from detrellis.demo import run_demo

    _leave(run_demo(out, epochs=epochs, seed=seed, console=console, masks=masks))


NewRun = Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/RECIPE-TIME).")]
SeedOfRun = Annotated[
    int | None,
    typer.Option(**limits(Seed), help="Decides weights, order and augmentation (default: 0)."),
]


@grouped
def train(
    *,
    recipe: RecipeName = None,
    weights: Weights = None,
    boxes: Boxes = None,
    files: Files,
    scale: Scale = None,
    scheme: Schemes = None,
    override: Overrides = None,
    epochs: EpochsOrAuto = None,
    auto_batch: AutoBatch = False,
    out: NewRun = None,
    seed: SeedOfRun = None,
    skip_bad: SkipBad = False,
    keep_partial: KeepPartial = False,
    resume: Annotated[Path | None, typer.Option(help="Continue this run, bit for bit.")] = None,
    track: Track = None,
    device: Device = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Train a recipe on a data set. Ctrl-C saves and stops;
    --resume goes on. Under torchrun it uses all processes.

    Example: detrellis train small --data my_data --epochs auto -o schedule.patience=5
    """
    # A misspelt word, or data that are not there, are told before torch is imported.
    if resume is not None:
        _only_with_resume(
            *(recipe, weights, boxes, scale, scheme, auto_batch, out, seed, skip_bad, keep_partial)
        )
    elif recipe is not None or weights is None:
        choose_recipe(recipe, scale, scheme or (), override or ())
    checked = files.hold_out or (resume is None and weights is None)
    shared: dict[str, Any] = {"data": files.source()} if checked else {**files.named()}
    from detrellis import api

    shared |= {"override": override or (), "epochs": epochs, "track": track or ()}
    shared |= {"device": device, "workers": workers, "console": progress_console(as_json)}
    if resume is not None:
        result = api.resume(resume, **shared)
    else:
        result = api.train(
            recipe,
            weights=weights,
            boxes=boxes,
            scale=scale,
            scheme=scheme or (),
            auto_batch=auto_batch,
            out=out,
            seed=seed or 0,
            skip_bad=skips(skip_bad, keep_partial),
            **shared,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        _print_train_result(result)
    _leave(result)


def _leave(result: TrainResult) -> None:
    """Exit with what a shell says of the signal that stopped an unfinished run."""
    if result.signal is not None:
        raise typer.Exit(128 + result.signal)


def _only_with_resume(*given: object) -> None:
    if any(value not in (None, False, []) for value in given):
        raise UserError(
            "--resume takes recipe, schemes, seed and folder from the run",
            "Free are --data (and --train, --val) where the data have moved, --epochs, -o "
            "optim.lr and a few others, --device and --workers.",
        )


def _print_train_result(result: Any) -> None:
    if result.result is not None:
        console.print(result.result.table())
        console.print(result.result.class_table())
    if result.finished:
        best = "" if result.best is None else f", best AP {result.best:.3f}"
        if result.early:
            console.print(f"Stopped early: AP rose no more. It has done {result.epochs} epochs.")
        console.print(f"Done in {result.seconds / 60:.1f} min: {result.run}{best}")
        console.say("Next: ", command("predict", result.run, "PICTURES", "--out", "pictures"))
    else:
        console.say(f"{result.stopped()} Go on with: ", command("train", "--resume", result.run))
