"""The command line: one verb a function, each with an example. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import detrellis
from detrellis.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train DETR-family object detectors on your own data. Start with [bold]detrellis demo[/bold].",
)
LEADS = os.environ.get("RANK", "0") == "0"  # under torchrun only one process speaks
console = Console(quiet=not LEADS)

Data = Annotated[Path | None, typer.Option(help="Data set folder: COCO, Roboflow, YOLO or Pascal VOC layout.")]
TrainFile = Annotated[Path | None, typer.Option("--train", help="COCO JSON to train on, instead of --data.")]
TrainImages = Annotated[Path | None, typer.Option(help="Folder of its images, if they are not near it.")]
ValFile = Annotated[Path | None, typer.Option("--val", help="COCO JSON to evaluate on.")]
ValImages = Annotated[Path | None, typer.Option(help="Folder of its images.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Drop bad images and boxes instead of refusing them (decodes all images).")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: a GPU if there is one).")]
Workers = Annotated[int, typer.Option(help="Processes that load images.")]
RecipeName = Annotated[
    str | None, typer.Argument(help="Recipe name; see `detrellis recipes` (default: that of --weights).")
]
Trained = Annotated[
    Path, typer.Argument(help="A run, a weights file, hf:org/name, a Hugging Face folder, or a reference's .pth.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Scale = Annotated[Literal["tiny"] | None, typer.Option(help="The recipe at a size for CPUs and small data.")]
Schemes = Annotated[list[str] | None, typer.Option("--scheme", help="Training scheme NAME[=N], several with commas.")]
Overrides = Annotated[list[str] | None, typer.Option("-o", help="Recipe field: key.sub=value. May be repeated.")]


def _version(value: bool) -> None:
    if value:
        print(detrellis.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _print_json(value: Any) -> None:
    if LEADS:
        print(json.dumps(value, indent=1))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, run and pictures.")] = Path("demo"),
    epochs: Annotated[int | None, typer.Option(help="Fewer for a quick look.")] = None,
    seed: int = 0,
) -> None:
    """Make a data set, check it, train on it, evaluate, and draw the result: about three minutes on two CPU cores.

    Example: detrellis demo
    """
    from detrellis.demo import run_demo

    run_demo(out, epochs=epochs, seed=seed, console=console)


@app.command()
def check(
    data: Data = None,
    train: TrainFile = None,
    train_images: TrainImages = None,
    val: ValFile = None,
    val_images: ValImages = None,
    fast: Annotated[bool, typer.Option("--fast", help="Do not decode the images.")] = False,
    fix: Annotated[Path | None, typer.Option(help="Write a clean copy of the annotations into this folder.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that decode (default: one a core).")] = None,
    as_json: AsJson = False,
) -> None:
    """Read a data set before anyone trains on it. Exit code: 0 clean, 1 errors found, 2 wrong use.

    Example: detrellis check --data my_data --fix my_data_clean
    """
    from detrellis.data.check import check as check_source
    from detrellis.data.fix import fix as fix_source
    from detrellis.data.layout import resolve

    source = resolve(data, train, train_images, val, val_images)
    report = check_source(source, fast=fast, progress=not as_json, workers=workers)
    fixed = None if fix is None else fix_source(source, report, fix)
    if as_json:
        _print_json(report.to_dict() | ({} if fixed is None else {"fixed": str(fixed.out), "changes": fixed.changes}))
    else:
        console.print(report.table())
        if fixed is not None:
            console.print(fixed.text())
    raise typer.Exit(report.exit_code)


@app.command()
def train(
    recipe: RecipeName = None,
    weights: Annotated[
        str | None, typer.Option(help="Start from these weights: a run, hf:org/name, a .pth, ...")
    ] = None,
    data: Data = None,
    train: TrainFile = None,
    train_images: TrainImages = None,
    val: ValFile = None,
    val_images: ValImages = None,
    scale: Scale = None,
    scheme: Schemes = None,
    override: Overrides = None,
    epochs: Annotated[int | None, typer.Option(help="Length of the run; the schedule follows it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/RECIPE-TIME).")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides weights, order and augmentation (default: 0).")] = None,
    skip_bad: SkipBad = False,
    resume: Annotated[Path | None, typer.Option(help="Continue this run, bit for bit.")] = None,
    device: Device = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Train a recipe on a data set. Ctrl-C saves and stops; --resume goes on. Under torchrun it uses all processes.

    Example: detrellis train tiny --data my_data --epochs 40 -o optim.lr=2e-4
    """
    from detrellis import api

    speaks = Console(stderr=True, quiet=not LEADS) if as_json else console  # stdout belongs to the JSON
    if resume is not None:
        _only_with_resume(
            *(recipe, weights, data, train, train_images, val, val_images),
            *(scale, scheme, override, epochs, out, seed, skip_bad),
        )
        result = api.resume(resume, device=device, workers=workers, console=speaks)
    else:
        result = api.train(
            recipe,
            weights=weights,
            data=data,
            train=train,
            train_images=train_images,
            val=val,
            val_images=val_images,
            scale=scale,
            scheme=scheme or (),
            override=override or (),
            epochs=epochs,
            out=out,
            seed=seed or 0,
            device=device,
            workers=workers,
            skip_bad=skip_bad,
            console=speaks,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        _print_train_result(result)


def _only_with_resume(*given: object) -> None:
    if any(value not in (None, False) for value in given):
        raise UserError(
            "--resume takes recipe, data and settings from the run", "Leave out all but --device, --workers."
        )


def _print_train_result(result: Any) -> None:
    if result.result is not None:
        console.print(result.result.table())
        console.print(result.result.class_table())
    if result.finished:
        best = "" if result.best is None else f", best AP {result.best:.3f}"
        console.print(f"Done in {result.seconds / 60:.1f} min: {result.run}{best}")
        console.print(f"Next: detrellis predict {result.run} PICTURES --out pictures")
    else:
        console.print(f"Stopped after step {result.steps}. Go on with: detrellis train --resume {result.run}")


@app.command(name="eval")
def evaluate(
    run: Trained,
    data: Data = None,
    val: ValFile = None,
    val_images: ValImages = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Split of the data set.")] = "val",
    results: Annotated[Path | None, typer.Option(help="Also write the detections here, in COCO's format.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 4,
    skip_bad: SkipBad = False,
    device: Device = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """COCO box AP of a run, on its own validation split or on other data.

    Example: detrellis eval runs/tiny-20260101-120000 --split test
    """
    from detrellis import api

    result = api.evaluate(
        run,
        data=data,
        val=val,
        val_images=val_images,
        split=split,
        results=results,
        batch_size=batch_size,
        skip_bad=skip_bad,
        device=device,
        workers=workers,
        progress=True,
    )
    if as_json:
        _print_json(result.to_dict())
        return
    console.print(result.table())
    console.print(result.class_table())


@app.command()
def predict(
    run: Trained,
    paths: Annotated[list[Path], typer.Argument(help="Pictures and folders of pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for annotated pictures and predictions.json.")] = Path(
        "predictions"
    ),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Lowest score to show.")] = 0.3,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Detect objects in pictures: annotated copies, and COCO-results JSON with the data set's own ids and names.

    Example: detrellis predict runs/tiny-20260101-120000 photo.jpg folder/ --out pictures
    """
    from detrellis import api

    predictions = api.predict(run, paths, threshold=threshold, out=out, device=device, progress=True)
    if as_json:
        print((out / "predictions.json").read_text())
        return
    table = Table("picture", "detections")
    for p in predictions:
        counts = {name: p.names.count(name) for name in dict.fromkeys(p.names)}
        table.add_row(escape(p.path.name), ", ".join(f"{n} {escape(name)}" for name, n in counts.items()) or "-")
    console.print(table)
    console.print(f"Pictures and predictions.json: {out}")


@app.command()
def convert(
    source: Trained,
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    to: Annotated[Literal["detrellis", "hf"] | None, typer.Option(help="Format (default: the other one).")] = None,
    classes: Annotated[Path | None, typer.Option(help="COCO JSON that names the classes of a .pth file.")] = None,
    dilation: Annotated[bool, typer.Option("--dilation", help="The .pth file is of a DC5 model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Checkpoints of transformers and of the reference repositories to ours, and ours to what transformers loads.

    Example: detrellis convert hf:facebook/detr-resnet-50 detr && detrellis convert runs/first for_transformers
    """
    from detrellis import api

    done = api.convert(source, out, to=to, classes=classes, dilation=dilation)
    if as_json:
        _print_json(done.to_dict())
        return
    console.print(f"{done.recipe}: {done.parameters:,} numbers, {done.classes} classes, to {out}")
    if done.skipped:
        console.print(f"Left out, a detector has no use for it: {', '.join(done.skipped)}")
    for difference in done.differences:
        console.print(f"Different there: {difference}.")
    if done.format == "hf":
        console.print(f'Next: AutoModelForObjectDetection.from_pretrained("{out}")')
    else:
        console.print(f"Next: detrellis predict {out} PICTURES, or: detrellis train --weights {out} --data my_data")


@app.command()
def info(
    recipe: Annotated[str, typer.Argument(help="Recipe name.")],
    classes: Annotated[int, typer.Option(min=1, help="Number of classes.")] = 80,
    scale: Scale = None,
    scheme: Schemes = None,
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, multiply-adds and training schemes of a recipe.

    Example: detrellis info dino-r50 --classes 91
    """
    from detrellis import api

    found = api.info(recipe, classes=classes, scale=scale, scheme=scheme or (), override=override or ())
    if as_json:
        _print_json(found.to_dict())
        return
    height, width = found.image_size
    table = Table("", found.recipe, title=escape(found.about), title_justify="left")
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("of these trained", f"{found.parameters_trainable:,}")
    table.add_row(f"multiply-adds at {width}x{height}", f"{found.gflops} GFLOPs")
    table.add_row("queries", str(found.queries))
    for s in found.schemes:
        table.add_row(f"scheme {s.name}, training only", f"+{s.parameters:,} parameters, up to +{s.queries} queries")
    console.print(table)


@app.command()
def bench(
    recipe: Annotated[str, typer.Argument(help="Recipe name.")],
    classes: Annotated[int, typer.Option(min=1, help="Number of classes.")] = 80,
    batch_sizes: Annotated[str, typer.Option(help="Images at a time, several with commas.")] = "1",
    size: Annotated[str | None, typer.Option(help="Short side, or HEIGHTxWIDTH (default: the recipe's).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's).")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="With torch.compile.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Time a training step instead of inference.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Timed passes, of which the median counts.")] = 10,
    scale: Scale = None,
    scheme: Schemes = None,
    override: Overrides = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Latency and throughput of a recipe here: inference, or a training step, with random weights.

    Example: detrellis bench dino-r50 --size 640x640 --batch-sizes 1,2 --threads 1
    """
    from detrellis import api
    from detrellis.engine.bench import How

    how: How = {"batch_sizes": batch_sizes, "size": size, "threads": threads, "compiled": compiled}
    how |= {"train": train, "runs": runs, "device": device}
    found = api.bench(recipe, classes=classes, scale=scale, scheme=scheme or (), override=override or (), **how)
    if as_json:
        _print_json(found.to_dict())
        return
    console.print(escape(found.about()), highlight=False)
    console.print(found.table())


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes.

    Example: detrellis recipes
    """
    from detrellis.recipes import RECIPES

    found = [make() for make in RECIPES]
    if as_json:
        _print_json([{"name": r.name, "about": r.about} for r in found])
        return
    table = Table("recipe", "what it is", "epochs", "schemes")
    for r in found:
        schemes = [name for name, value in r.schemes if value is not None]
        table.add_row(r.name, escape(r.about), str(r.schedule.epochs), ", ".join(schemes) or "-")
    console.print(table)


def main() -> None:
    """Entry point: an error that the user can put right is a message and exit code 2, never a traceback."""
    try:
        app()
    except UserError as error:
        stderr = Console(stderr=True)
        stderr.print(f"[bold red]error[/] {escape(error.message)}", highlight=False)
        if error.remedy:
            stderr.print(f"  {escape(error.remedy)}", highlight=False)
        raise SystemExit(2) from None
    except OSError as error:  # a full disk, a folder that may not be written
        if error.filename is None:
            raise
        Console(stderr=True).print(
            f"[bold red]error[/] {escape(f'{error.filename}: {error.strerror}')}", highlight=False
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
