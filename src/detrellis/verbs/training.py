"""`train`, and `resume` where a run was stopped; `draw_samples` shows what they train on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from detrellis.arguments import Auto, Epochs, Scale, Seed, Workers, checked
from detrellis.data.annotations import Annotations
from detrellis.data.batch import Normalise
from detrellis.data.classes import ClassMap
from detrellis.data.doctor.check import prepare
from detrellis.data.findings import SkipBad
from detrellis.data.layout import DataSource, find_data
from detrellis.data.masks import has_outlines
from detrellis.distributed import World, all_gather, process_group
from detrellis.engine.auto_batch import refuse_both, with_auto_batch
from detrellis.engine.batches import batch_per_process
from detrellis.engine.capacity import capacity
from detrellis.engine.card import Card
from detrellis.engine.length import auto_epochs, describe_auto
from detrellis.engine.outcome import TrainResult
from detrellis.engine.resume import resumed_run
from detrellis.engine.samples import SHEET, images_an_epoch, samples_sheet, training_dataset
from detrellis.engine.state import TrainJob
from detrellis.engine.tracker_libraries import Track, named, tracker_names
from detrellis.engine.trackers import IDS, Tracker, read_ids
from detrellis.engine.train import train as run_job
from detrellis.engine.transfer import InitialWeights
from detrellis.errors import UserError, command
from detrellis.folders import held, new_folder
from detrellis.interop.convert import load_any
from detrellis.interop.load import is_foreign
from detrellis.outputs import Outputs, jpeg
from detrellis.recipes import Recipe, choose_recipe
from detrellis.recipes.build_backbone import starting_from
from detrellis.report import write as reporting
from detrellis.verbs.evaluation import evaluate

# What a run writes beside its weights.
LOGS: tuple[str, ...] = (
    "metrics.jsonl",
    "tensorboard",
    "wandb",
    IDS,
    "epochs",
    "best",
    SHEET,
    "bad_batch-0.pt",
)
LOGS += reporting.report_names("val")
WEIGHTS = ("best.safetensors", "last.safetensors", "previous.state.pt")


@checked
def train(
    recipe: str | Recipe | None = None,
    *,
    weights: str | Path | None = None,
    boxes: str | Path | None = None,
    data: str | Path | DataSource | None = None,
    train: str | Path | None = None,
    train_images: str | Path | None = None,
    val: str | Path | None = None,
    val_images: str | Path | None = None,
    scale: Scale | None = None,
    scheme: str | Sequence[str] = (),
    override: str | Sequence[str] = (),
    epochs: Epochs | Auto | None = None,
    auto_batch: bool = False,
    out: str | Path | None = None,
    seed: Seed = 0,
    device: str | None = None,
    workers: Workers = 2,
    skip_bad: SkipBad = False,
    track: Track | Sequence[Track] = (),
    console: Console | None = None,
) -> TrainResult:
    """Train a recipe on a data set: a folder (`data`), or COCO files (`train`, `val`).

    `weights` are what it starts from: a run's folder or weights file, of any classes. What fits is
    taken over, rows of the class heads by the classes' names; the result's `transfer` tells what
    did. Without `recipe`, theirs is trained. `boxes` names weights too, of which the reference
    boxes (anchors) alone are taken over. `scale="tiny"` takes the recipe at a size for CPUs and
    small data, `scheme` adds training schemes (`"cdn=50"`), `override` sets recipe fields
    (`"optim.lr=1e-4"`), `epochs="auto"` trains for as many as the size of the data set asks for
    (`engine/length.py`), `auto_batch` takes as many images at a time as fit into memory
    (`engine/auto_batch.py`). `out` is the run's folder (default: `runs/` with the recipe's name and
    the time). `track` names trackers that get the log besides TensorBoard (`"wandb"`), or is one of
    your own (`engine/trackers.py`). Raises `UserError` where the data set has errors, unless
    `skip_bad` drops bad records and the images that lose an object by that (`"boxes"`: these stay).
    """
    if auto_batch:
        refuse_both(override)
    default, initial = _recipe_and_weights(recipe, weights)
    anchors = None if boxes is None else load_any(boxes)[0]
    chosen = choose_recipe(default, scale, scheme, override)
    if isinstance(epochs, int):
        chosen = chosen.override(f"schedule.epochs={epochs}")
    chosen, backbone = starting_from(chosen, None if initial is None else initial.statistics)
    source = find_data(data, train, train_images, val, val_images)
    if out is not None:
        _check_free(Path(out))
    say, tried = _say(console), workers if auto_batch else None
    with process_group(device) as world:
        training, validation, classes = _prepared(source, chosen, skip_bad, world, console)
        chosen = _fitted(chosen, training, world, epochs == "auto", tried, say)
        card = Card(chosen, classes, source.to_dict(), int(seed), skip_bad)
        card = replace(card, backbone=backbone, weights=_origin(weights), boxes=_origin(boxes))
        trackers = _trackers(track)
        place = new_folder(chosen.name, world) if out is None else nullcontext(Path(out))
        with place as folder, held(folder, world, new=True, check=partial(_begin, folder)):
            job = TrainJob(card, training, validation, folder, workers, initial, anchors, trackers)
            report = partial(reporting.report_of_run, folder, say)
            return run_job(job, world, console=console, report=report)


@checked
def resume(
    run: str | Path,
    *,
    data: str | Path | DataSource | None = None,
    train: str | Path | None = None,
    train_images: str | Path | None = None,
    val: str | Path | None = None,
    val_images: str | Path | None = None,
    override: str | Sequence[str] = (),
    epochs: Epochs | None = None,
    device: str | None = None,
    workers: Workers = 2,
    track: Track | Sequence[Track] = (),
    console: Console | None = None,
) -> TrainResult:
    """Continue a run that was stopped, bit for bit; recipe, data and seed are the run's own.

    `data`, or `train` and `val`, say where the same data set is now, if it has moved. `epochs` is
    another length of the whole run, also of a finished one, and `override` sets what the saved
    state does not depend on (`"optim.lr=1e-5"`): see `engine/resume.py`. Trackers go on in the runs
    that they began; `track` adds others, and one of your own has to be given again. Raises
    `UserError` where the run cannot go on, or the data are not those of the run.
    """
    files = (train, train_images, val, val_images)
    moved = None if data is None and not any(files) else find_data(data, *files)
    with process_group(device) as world, held(Path(run), world):
        resumed = resumed_run(
            Path(run), moved, [override] if isinstance(override, str) else override, epochs
        )
        if world.is_main_process:
            _say(console)(resumed.summary)
        card = resumed.card
        training, validation, classes = _prepared(
            resumed.source, card.recipe, card.skip_bad, world, console
        )
        resumed.check(training, validation, classes)
        trackers = _trackers(track, read_ids(Path(run)))
        job = TrainJob(card, training, validation, Path(run), workers, trackers=trackers)
        report = partial(reporting.report_of_run, Path(run), _say(console))
        result = run_job(job, world, resumed.state, console, report)
        if result.finished and all_gather(reporting.is_missing(Path(run), validation))[0]:
            # The best epoch was evaluated by a process that ended before it reported: again, in the
            # same batches.
            try:
                evaluate(
                    run,
                    metric="masks" if card.recipe.needs_bitmaps else "coco",
                    data=resumed.source,
                    report=run,
                    batch_size=batch_per_process(card.recipe, world),
                    skip_bad=card.skip_bad,
                    workers=workers,
                    device=device,
                )
            except (UserError, OSError) as error:
                _say(console)(reporting.not_written(error, Path(run)))
        return result


def _trackers(track: Track | Sequence[Track], known: Iterable[str] = ()) -> list[Tracker]:
    """TensorBoard, those that a resumed run has `known`, and those that are asked for."""
    wanted = [track] if isinstance(track, str | Tracker) else list(track)
    names = tracker_names([each for each in wanted if isinstance(each, str)])
    return [
        *named(["tensorboard", *known, *names]),
        *(each for each in wanted if not isinstance(each, str)),
    ]


def draw_samples(
    recipe: Recipe, data: str | Path | DataSource, count: int, out: str | Path = "."
) -> Path:
    """Draw `count` pictures as the recipe would train on them,
    augmented, with their boxes, and masks where all have.

    Returns the file, `train_samples.jpg` in the folder `out`. Raises `UserError` where the data set
    has errors, or where another file is in the way.
    """
    outputs = Outputs(out, "--show")
    outputs.ready([SHEET])
    training, *_ = prepare(find_data(data))
    shown = recipe.override("data.masks=true") if has_outlines(training) else recipe
    dataset = training_dataset(training, shown, seed=0)
    return outputs.write(SHEET, jpeg(samples_sheet(dataset, training.classes.names, count)))


def _fitted(
    recipe: Recipe,
    training: Annotations,
    world: World,
    length: bool,
    workers: int | None,
    say: Callable[[str], None],
) -> Recipe:
    """The recipe with what the data set decides:
    its `length`, and the passes of a step where `workers` load for it.
    """
    told = []
    if length:
        images = images_an_epoch(training, recipe)
        recipe = recipe.override(f"schedule.epochs={auto_epochs(recipe, images)}")
        told.append(describe_auto(recipe, images))
    if workers is not None:
        recipe, passes = with_auto_batch(recipe, training, world, workers)
        told.append(passes)
    if told and world.is_main_process:
        say("\n".join(told))
    return recipe


def _check_free(folder: Path) -> None:
    """Raises `UserError` where a new run would write over another run,
    or over a file that is no log of one.
    """
    if (folder / "last.state.pt").exists():
        go_on = command("train", "--resume", folder)
        raise UserError(
            f"{folder}: there is a run in this folder",
            f"Take another --out, or go on with it: {go_on}",
        )
    if weights := [name for name in WEIGHTS if (folder / name).exists()]:
        raise UserError(
            f"{folder / weights[0]}: there are weights in this folder", "Take another --out."
        )
    Outputs(folder).ready(LOGS)


def _begin(folder: Path) -> None:
    """Take the folder for a new run;
    `UserError` where another one has come since it was looked at.
    """
    _check_free(folder)
    Outputs(folder).take(LOGS)


def _recipe_and_weights(
    recipe: str | Recipe | None, weights: str | Path | None
) -> tuple[str | Recipe | None, InitialWeights | None]:
    """The recipe to train, by default that of the weights, and the weights to start from."""
    if weights is None:
        return recipe, None
    tensors, card = load_any(weights)
    statistics = Normalise.of(**card.recipe.data.statistics()).statistics
    start = InitialWeights(tensors, card.classes, card.recipe.detector.objectness, statistics)
    return card.recipe if recipe is None else recipe, start


def _origin(place: str | Path | None) -> str | None:
    """How a card names a checkpoint."""
    return (
        place if place is None else str(place) if is_foreign(place) else str(Path(place).absolute())
    )


def _say(console: Console | None) -> Callable[[str], None]:
    """Prints a line as it is, to the console where there is one."""
    return (
        print
        if console is None
        else partial(console.print, markup=False, highlight=False, soft_wrap=True)
    )


def _prepared(
    source: DataSource, recipe: Recipe, skip_bad: SkipBad, world: World, console: Console | None
) -> tuple[Annotations, Annotations | None, ClassMap]:
    """The data set after its fast check;
    the first process says what was found and what was left out.
    """
    undecoded = ("train",) if recipe.data.unreadable == "replace" else ()  # the loader sees to that
    training, validation, classes, report = prepare(
        source, skip_bad, capacity(recipe), undecoded=undecoded
    )
    if world.is_main_process:
        say = print if console is None else console.print
        for split, skipped in report.skipped.items():
            say(f"{split}: left out {', '.join(f'{n} {code}' for code, n in skipped.items())}")
        if warnings := report.text("warning"):
            say(warnings)
        if validation is not None and source.splits["val"].part is not None:
            say(
                f"Held out to validate on: {len(validation)} of {len(training) + len(validation)} "
                "images, which are the same in every run."
            )
        if validation is None:
            say(
                "No validation split: the run is not evaluated, and its last weights are the "
                "ones to use. --hold-out validates on one in five of the training images."
            )
    return training, validation, classes
