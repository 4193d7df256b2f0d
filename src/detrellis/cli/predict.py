"""`detrellis predict`: the objects that a detector detects in pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from detrellis.arguments import BatchSize, Iou, LabelFormat, limits
from detrellis.cli.options import IS_MAIN_PROCESS, AsJson, Device, ScoreOrAuto, Trained, Tta, TtaViews, console, errors

if TYPE_CHECKING:
    from detrellis.predictions.record import Predictions, UnreadablePicture


def predict(
    run: Trained,
    pictures: Annotated[list[str], typer.Argument(help="Pictures, folders of pictures, and patterns ('pics/*.jpg').")],
    out: Annotated[Path, typer.Option(help="Folder for annotated pictures and predictions.json.")] = Path(
        "predictions"
    ),
    recursive: Annotated[bool, typer.Option("--recursive", help="Also pictures in the folders of folders.")] = False,
    threshold: ScoreOrAuto = 0.3,
    nms: Annotated[
        float | None, typer.Option(**limits(Iou), help="Apply NMS at this IoU: where objects are found twice.")
    ] = None,
    tta: Tta = False,
    tta_views: TtaViews = None,
    batch: Annotated[
        int,
        typer.Option("--batch", "--batch-size", **limits(BatchSize), help="Pictures at a time, of those of one size."),
    ] = 1,
    txt: Annotated[
        bool, typer.Option("--txt", help="Also write YOLO text: labels/NAME.txt, with class cx cy w h score.")
    ] = False,
    format_: Annotated[
        LabelFormat | None,
        typer.Option("--format", help="Also write labels to correct or to train on, with the pictures: OUT/FORMAT."),
    ] = None,
    crops: Annotated[
        bool, typer.Option("--crops", help="Also write a picture of each detection: OUT/crops/CLASS/NAME-1.jpg.")
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Detect objects in pictures: annotated copies, and COCO-results JSON with the data set's own ids and names.

    A picture that cannot be read is named, and does not stop the others. Nothing is written over but what an earlier
    predict left. Exit code: 0 all pictures were read, 1 some were not, 2 wrong use.

    Example: detrellis predict runs/tiny-20260101-120000 photo.jpg folder/ --threshold auto --out pictures --tta

    Labels to correct: detrellis predict runs/tiny-20260101-120000 folder/ --format cvat
    """
    from detrellis import api

    def report(failure: UnreadablePicture) -> None:
        if IS_MAIN_PROCESS:
            errors.say(("error", "bold red"), f" {failure.why}")

    predictions = api.predict(
        run,
        pictures,
        threshold=threshold,
        nms=nms,
        tta=tta if tta_views is None else tta_views,
        batch_size=batch,
        recursive=recursive,
        out=out,
        txt=txt,
        format=format_,
        crops=crops,
        device=device,
        on_error=report,
        progress=True,
    )
    if as_json:
        print((out / "predictions.json").read_text(encoding="utf-8"))
    else:
        others = {"labels": out / format_} if format_ else {}
        _show(predictions, out, others | ({"crops": out / "crops"} if crops else {}))
    if failures := predictions.failures:
        remedies = " ".join(dict.fromkeys(failure.remedy for failure in failures))
        count = f"{len(failures)} of {len(predictions) + len(failures)} pictures could not be read. {remedies}"
        if IS_MAIN_PROCESS:
            errors.say(count)
        raise typer.Exit(1)


def _show(predictions: Predictions, out: Path, others: Mapping[str, Path]) -> None:
    table = Table("picture", "detections")
    for prediction in predictions:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(prediction.names).items())
        table.add_row(Text("" if prediction.path is None else prediction.path.name), Text(counts or "-"))
    console.print(table)
    console.say(f"Pictures and predictions.json: {out}", *(f"; {what}: {place}" for what, place in others.items()))
