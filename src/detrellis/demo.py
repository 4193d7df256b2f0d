"""`detrellis demo`: the user's whole path on the built-in data,
in three to eight minutes on two CPU cores; with masks it takes longer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from detrellis import api
from detrellis.data.annotations import Annotations
from detrellis.data.doctor.check import check
from detrellis.data.layout import DataSource, resolve
from detrellis.data.masks import run_lengths
from detrellis.data.records import to_annotations
from detrellis.data.shapes import write_shapes
from detrellis.engine.checkpoint import load_weights
from detrellis.engine.outcome import TrainResult
from detrellis.errors import UserError, command
from detrellis.outputs import Outputs, jpeg
from detrellis.recipes import Recipe, find_recipe
from detrellis.recipes.build_backbone import starting_from
from detrellis.recipes.scale import MASK_LOSSES
from detrellis.terminal import Terminal
from detrellis.visualize.detections import draw_detections
from detrellis.visualize.sheets import contact_sheet

SIDE = 112  # pixels: small enough for minutes on two cores
SETTINGS = (
    f"data.size=[{SIDE}, {SIDE}]",
    "data.zoom=[0.9, 1.1]",
    # Pictures of one size, in training too: whole cells would cost a third more and bring nothing
    "detector.size_divisor=1",
    "data.jitter=0",  # the colours are random already
    "optim.batch_size=4",
    "schemes.cdn.number=50",
    "schedule.eval_every=2",
)
PICTURE = "predictions.jpg"
MASKS = (
    "detector.masks={width: 64}",
    *(f"loss.{name}={value}" for name, value in MASK_LOSSES.items()),
)
EPOCHS = 7


def run_demo(
    out: Path, *, epochs: int | None, seed: int, console: Terminal, masks: bool = False
) -> TrainResult:
    """Make data, check, train, evaluate, draw; with `masks` of each object.
    A demo that was stopped goes on with its run, to the same picture."""
    outputs, settings = Outputs(out), (*SETTINGS, *MASKS) if masks else SETTINGS
    outputs.ready([PICTURE])
    data = write_shapes(
        out / "data", train=500, val=100, size=(SIDE, SIDE), objects=(1, 4), masks=masks
    )
    console.heading("detrellis check")
    console.say(command("check", "--data", data))
    source = resolve(data, None, None, None, None)
    console.print(check(source, fast=False, progress=True, workers=None).table())

    console.heading("detrellis train")
    result = _train(source, out, settings, epochs or EPOCHS, seed, console)
    if not result.finished:
        asked = [*(["--masks"] if masks else []), *([] if epochs is None else ["--epochs", epochs])]
        asked += ["--seed", seed] if seed else []
        console.say(
            f"{result.stopped()} Go on, to the picture: ", command("demo", "--out", out, *asked)
        )
        return result
    if result.result is not None:
        console.print(result.result.table())
        console.print(result.result.class_table())

    val = to_annotations(source.load("val"))
    picture = outputs.write(PICTURE, jpeg(_sheet(api.load(result.run), val)))
    console.heading("done")
    console.say("Open ", (str(picture), "bold"), ": ground truth above, predictions below.")
    console.say(
        "Next, on your own data: ",
        (command("train", "small", "--data", "YOUR_FOLDER", "--epochs", "auto"), "bold"),
    )
    return result


def _train(
    source: DataSource,
    out: Path,
    settings: Sequence[str],
    epochs: int,
    seed: int,
    console: Terminal,
) -> TrainResult:
    """Go on with this demo's run where one was stopped; otherwise a new one."""
    recipe = find_recipe("tiny").override([*settings, f"schedule.epochs={epochs}"])
    runs = sorted(out.glob("run*/"))
    if stopped := next((run for run in runs if _is_stopped(run, recipe, seed)), None):
        console.say(command("train", "--resume", stopped))
        return api.resume(stopped, console=console)
    folder = _free(out / "run")
    options = [word for setting in settings for word in ("-o", setting)]
    length = ("--epochs", epochs, "--seed", seed)
    console.say(
        command("train", "tiny", "--data", out / "data", "--out", folder, *length, *options)
    )
    return api.train(recipe, data=source, out=folder, seed=seed, console=console)


def _is_stopped(run: Path, recipe: Recipe, seed: int) -> bool:
    """Whether the run is of that recipe and seed, and can be resumed."""
    if not (run / "last.state.pt").exists() or not (run / "last.safetensors").exists():
        return False
    try:
        card = load_weights(run / "last.safetensors")[1]
    except UserError:
        return False
    return (card.recipe, card.seed) == (
        starting_from(recipe)[0],
        seed,
    ) and card.epoch < recipe.schedule.epochs


def _free(folder: Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3`, ...
    that does not exist: a second demo keeps the first run.
    """
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _sheet(model: api.Model, val: Annotations, pictures: int = 6) -> Image.Image:
    """The first pictures of the validation split,
    truth in the upper row and predictions in the lower.
    """
    names = val.classes.names
    masks = None if model.recipe.detector.masks is None else run_lengths(val)
    truth, predicted, titles = [], [], []
    for index in range(min(pictures, len(val))):
        prediction = model.predict(val.path(index), threshold=0.3)[0]
        rows = slice(val.starts[index], val.starts[index + 1])
        boxes = [(x, y, x + w, y + h) for x, y, w, h in val.boxes[rows].tolist()]
        picture = Image.open(val.path(index)).convert("RGB")
        drawn = None if masks is None else [mask["counts"] for mask in masks[rows]]
        truth.append(
            draw_detections(picture, boxes, val.labels[rows].tolist(), None, names, masks=drawn)
        )
        predicted.append(prediction.draw(names))
        titles.append(val.path(index).name)
    captions = [f"{title}: {what}" for what in ("truth", "predicted") for title in titles]
    return contact_sheet([*truth, *predicted], len(truth), captions)
