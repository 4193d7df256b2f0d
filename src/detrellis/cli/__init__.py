"""The command line: one verb a function, each with an example. Heavy imports wait until a verb
needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from detrellis.arguments import Epochs, Seed, Threads, limits
from detrellis.cli.analyze import analyze
from detrellis.cli.entry import start
from detrellis.cli.options import (
    AsJson,
    AutoBatch,
    Boxes,
    Device,
    EpochsOrAuto,
    EvalData,
    Files,
    KeepPartial,
    Metric,
    Overrides,
    RecipeName,
    Scale,
    Schemes,
    SkipBad,
    Track,
    Trained,
    Ways,
    Weights,
    Workers,
    console,
    errors,
    grouped,
    print_json,
    progress_console,
    skips,
)
from detrellis.cli.predict import predict
from detrellis.cli.recipes import bench, info, recipes
from detrellis.cli.serve import push, serve
from detrellis.cli.study import compare, reproduce
from detrellis.cli.tune import tune
from detrellis.errors import UserError, command
from detrellis.recipes import Recipe, choose_recipe
from detrellis.version import __version__

if TYPE_CHECKING:
    from detrellis.data.doctor.boxes import Capacity
    from detrellis.data.layout import DataSource
    from detrellis.engine.outcome import TrainResult

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


@app.command()
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
    """Make a data set, check it, train on it, evaluate, and draw the result: three to eight minutes
    on two CPU cores.

    Example: detrellis demo
    """
    from detrellis.demo import run_demo

    _leave(run_demo(out, epochs=epochs, seed=seed, console=console, masks=masks))


@app.command()
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
    show: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help="Draw so many pictures as --recipe (default: small) trains on them.",
        ),
    ] = None,
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


@app.command()
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
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run (default: runs/RECIPE-TIME).")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(**limits(Seed), help="Decides weights, order and augmentation (default: 0)."),
    ] = None,
    skip_bad: SkipBad = False,
    keep_partial: KeepPartial = False,
    resume: Annotated[Path | None, typer.Option(help="Continue this run, bit for bit.")] = None,
    track: Track = None,
    device: Device = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Train a recipe on a data set. Ctrl-C saves and stops; --resume goes on. Under torchrun it
    uses all processes.

    Example: detrellis train small --data my_data --epochs auto -o optim.lr=2e-4
    """
    # A misspelt word, or data that are not there, are told before torch is imported.
    if resume is not None:
        _only_with_resume(
            *(recipe, weights, boxes, scale, scheme, auto_batch, out, seed, skip_bad, keep_partial)
        )
    elif recipe is not None or weights is None:
        choose_recipe(recipe, scale, scheme or (), override or ())
    data: dict[str, Any] = (
        {"data": files.source()} if resume is None and weights is None else vars(files)
    )
    from detrellis import api

    shared: dict[str, Any] = {"override": override or (), "epochs": epochs, "track": track or ()}
    shared["console"] = progress_console(as_json)
    if resume is not None:
        result = api.resume(resume, device=device, workers=workers, **data, **shared)
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
            device=device,
            workers=workers,
            **data,
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


@app.command(name="eval")
@grouped
def evaluate(
    run: Trained,
    *,
    on: EvalData,
    metric: Metric = "coco",
    results: Annotated[
        Path | None, typer.Option(help="Also write the detections here, in COCO's format.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html: what goes wrong (default: the run, on its own data)."
        ),
    ] = None,
    ways: Ways,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """AP of a run, of its boxes as COCO or Pascal VOC counts it or of its masks, on its own
    validation split or on other data.

    Example: detrellis eval runs/tiny-20260101-120000 --split test --tta-views 256,320,flip
    """
    from detrellis import api

    options: dict[str, Any] = {
        "metric": metric,
        "results": results,
        "report": report,
        "device": device,
    }
    result = api.evaluate(run, **options, progress=True, **ways.chosen(), **vars(on.on()))
    if as_json:
        print_json(result.to_dict())
        return
    console.print(result.table())
    console.print(result.class_table())
    if (page := getattr(result, "report", None)) is not None:  # VOC's metric has none
        console.say("What goes wrong, and where: ", page)


@app.command()
def convert(
    source: Trained,
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    to: Annotated[
        Literal["detrellis", "hf"] | None, typer.Option(help="Format (default: the other one).")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="COCO JSON that names the classes of a .pth file.")
    ] = None,
    dilation: Annotated[
        bool, typer.Option("--dilation", help="The .pth file is of a DC5 model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Checkpoints of transformers and of the reference repositories to ours, and ours to what
    transformers loads.

    Example: detrellis convert hf:facebook/detr-resnet-50 detr && detrellis convert detr
    for_transformers
    """
    from detrellis import api

    done = api.convert(source, out, to=to, classes=classes, dilation=dilation)
    if as_json:
        print_json(done.to_dict())
        return
    console.print(f"{done.recipe}: {done.parameters:,} numbers, {done.classes} classes, to {out}")
    if done.skipped:
        console.print(f"Left out, a detector has no use for it: {', '.join(done.skipped)}")
    for difference in done.differences:
        console.print(f"Different there: {difference}.")
    if done.format == "hf":
        console.say(f"Next, in Python: AutoModelForObjectDetection.from_pretrained({str(out)!r})")
    else:
        console.say("Next: ", command("predict", out, "PICTURES"))
        console.say("  or: ", command("train", "--weights", out, "--data", "my_data"))


@app.command()
def export(
    run: Trained,
    *,
    format_: Annotated[
        Literal["onnx", "openvino", "torch"],
        typer.Option("--format", help="Of the file: .onnx, .xml or .pt2."),
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="File to write (default: model.onnx, ... in the run).")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Of all pictures (default: any; takes minutes)."),
    ] = None,
    detections: Annotated[
        bool, typer.Option("--detections", help="Ranked scores, labels and corners, too.")
    ] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision.")] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Backbone to encoder in 8 bits (openvino); not written if that costs 1 AP.",
        ),
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Data set to calibrate --int8 and measure it on (default: the run's)."),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(help="Pictures on which both have to detect the same; exit code 1 if not."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The network of a run for ONNX Runtime, OpenVINO or torch. `predict` and `eval` take the .onnx
    and .xml files.

    Example: detrellis export RUN --verify my_data/images/val && detrellis predict RUN/model.onnx
    photo.jpg For CPUs: detrellis export RUN --format openvino --int8 && detrellis eval
    RUN/model-int8.xml
    """
    from detrellis import api

    fixed = None if size is None else api.parse_size(size)
    done = api.export(
        run,
        out,
        format=format_,
        size=fixed,
        detections=detections,
        fp16=fp16,
        int8=int8,
        calibrate=calibrate,
        verify=verify,
    )
    written, verification = done.exported, done.verification
    if as_json:
        print_json(done.to_dict())
    else:
        height, width = (side or "any" for side in written.size)
        size = (
            "of any size"
            if written.size == (None, None)
            else f"of {height}x{width} pixels (height, width)"
        )
        console.print(
            f"{written.out}: {written.bytes / 2**20:.1f} MiB, pictures {size}, any number at a time"
        )
        console.print(f"Outputs: {', '.join(written.outputs)}")
        if written.int8 is not None:
            console.print(written.int8.table())
        if verification is not None:
            console.print(verification.table())
            console.print("The same." if verification.passed else "Not the same.")
        elif written.format != "torch":
            console.say("Next: ", command("predict", written.out, "PICTURES", "--out", "pictures"))
    if verification is not None and not verification.passed:
        raise typer.Exit(1)


for verb in (predict, serve, push, info, bench, recipes, compare, reproduce, tune):
    app.command()(verb)
app.add_typer(analyze, name="analyze")


def main() -> NoReturn:
    """Run the command line; `__main__.py` is what the shell calls."""
    start(app)
