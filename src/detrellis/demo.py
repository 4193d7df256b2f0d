"""`detrellis demo`: the user's whole path on the built-in data, in about three minutes on two CPU cores."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from rich.console import Console

from detrellis import api
from detrellis.data.annotations import Annotations
from detrellis.data.check import check
from detrellis.data.layout import resolve
from detrellis.data.records import to_annotations
from detrellis.data.shapes import write_shapes
from detrellis.outputs import Outputs, jpeg
from detrellis.visualize import contact_sheet, draw_detections

SIDE = 112  # pixels: small enough for minutes on two cores
SETTINGS = (
    f"data.size=[{SIDE}, {SIDE}]",
    "data.zoom=[0.9, 1.1]",
    "data.jitter=0",  # the colours are random already
    "optim.batch_size=4",
    "schemes.cdn.number=50",
    "schedule.eval_every=2",
)
EPOCHS = 7
PICTURE = "predictions.jpg"


def run_demo(out: Path, *, epochs: int | None, seed: int, console: Console) -> Path:
    """Make data, check, train, evaluate, draw; returns the picture's path."""
    outputs = Outputs(out)
    outputs.ready([PICTURE])
    data = write_shapes(out / "data", train=500, val=100, size=(SIDE, SIDE), objects=(1, 4))
    console.rule("detrellis check")
    console.print(f"detrellis check --data {data}")
    source = resolve(data, None, None, None, None)
    console.print(check(source, fast=False, progress=True, workers=None).table())

    folder, epochs = _free(out / "run"), epochs or EPOCHS
    console.rule("detrellis train")
    options = " ".join(f"-o {s!r}" for s in SETTINGS)
    console.print(f"detrellis train tiny --data {data} --out {folder} --epochs {epochs} --seed {seed} {options}")
    result = api.train("tiny", data=source, override=SETTINGS, epochs=epochs, out=folder, seed=seed, console=console)
    if not result.finished:
        console.print(f"Stopped. Go on with: detrellis train --resume {result.run}")
        return result.run
    if result.result is not None:
        console.print(result.result.table())
        console.print(result.result.class_table())

    val = to_annotations(source.load("val"))
    picture = outputs.write(PICTURE, jpeg(_sheet(api.load(result.run), val)))
    console.rule("done")
    console.print(f"Open [bold]{picture}[/]: ground truth above, predictions below.")
    console.print("Next, on your own data: [bold]detrellis train tiny --data YOUR_FOLDER[/]")
    return picture


def _free(folder: Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3`, ... that does not exist: a second demo keeps the first run."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _sheet(model: api.Model, val: Annotations, pictures: int = 6) -> Image.Image:
    """The first pictures of the validation split, truth in the upper row and predictions in the lower."""
    names = val.classes.names
    truth, found, titles = [], [], []
    for index in range(min(pictures, len(val))):
        prediction = model.predict(val.path(index), threshold=0.3)[0]
        own = slice(val.starts[index], val.starts[index + 1])
        boxes = [(x, y, x + w, y + h) for x, y, w, h in val.boxes[own].tolist()]
        picture = Image.open(val.path(index)).convert("RGB")
        truth.append(draw_detections(picture, boxes, val.labels[own].tolist(), None, names))
        found.append(prediction.draw(names))
        titles.append(val.path(index).name)
    return contact_sheet(
        [*truth, *found], len(truth), [*(f"{t}: truth" for t in titles), *(f"{t}: predicted" for t in titles)]
    )
