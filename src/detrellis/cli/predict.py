"""`detrellis predict`: the objects that a detector detects in pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from detrellis.arguments import BatchSize, LabelFormat, limits
from detrellis.cli.options import (
    IS_MAIN_PROCESS,
    AsJson,
    Device,
    ScoreOrAuto,
    Trained,
    Ways,
    console,
    errors,
    grouped,
)

if TYPE_CHECKING:
    from detrellis.predictions.record import Predictions, UnreadablePicture


@dataclass(frozen=True)
class Also:
    """What is written beside drawn pictures and predictions.json."""

    txt: Annotated[
        bool, typer.Option("--txt", help="Also write YOLO text: labels/NAME.txt, with class cx cy w h score.")
    ] = False
    format: Annotated[
        LabelFormat | None,
        typer.Option("--format", help="Also write labels to correct or to train on, with the pictures: OUT/FORMAT."),
    ] = None
    crops: Annotated[
        bool, typer.Option("--crops", help="Also write a picture of each detection: OUT/crops/CLASS/NAME-1.jpg.")
    ] = False

    def places(self, out: Path) -> dict[str, Path]:
        """The folders of it, by what they hold."""
        labels = {"labels": out / self.format} if self.format else {}
        return labels | ({"crops": out / "crops"} if self.crops else {})


@grouped
def predict(
    run: Trained,
    pictures: Annotated[list[str], typer.Argument(help="Pictures, folders of pictures, and patterns ('pics/*.jpg').")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for annotated pictures and predictions.json.")] = Path(
        "predictions"
    ),
    recursive: Annotated[bool, typer.Option("--recursive", help="Also pictures in the folders of folders.")] = False,
    threshold: ScoreOrAuto = 0.3,
    ways: Ways,
    batch: Annotated[
        int,
        typer.Option("--batch", "--batch-size", **limits(BatchSize), help="Pictures at a time, of those of one size."),
    ] = 1,
    also: Also,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Detect objects in pictures: annotated copies, and COCO-results JSON with the data set's own ids and names.

    A picture that cannot be read is named, and does not stop the others. Nothing is written over but what an earlier
    predict left. Exit code: 0 all pictures were read, 1 some were not, 2 wrong use.

    Example: detrellis predict runs/tiny-20260101-120000 photo.jpg folder/ --threshold auto --out pictures --tta

    Small objects in large pictures: detrellis predict runs/tiny-20260101-120000 aerial.jpg --tiles 640 --batch 4

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
        **ways.chosen(),
        batch_size=batch,
        recursive=recursive,
        out=out,
        **vars(also),
        device=device,
        on_error=report,
        progress=True,
    )
    if as_json:
        print((out / "predictions.json").read_text(encoding="utf-8"))
    else:
        _show(predictions, out, also.places(out))
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
