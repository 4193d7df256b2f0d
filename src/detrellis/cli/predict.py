"""`detrellis predict`: the objects that a detector detects in pictures and videos."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from detrellis.arguments import BatchSize, Count, LabelFormat, limits
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
    from detrellis.predictions.record import Prediction, UnreadablePicture


Every = Annotated[
    int,
    typer.Option(
        "--every",
        **limits(Count),
        help="Of a video, one frame of so many; the others are left out.",
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        "--batch",
        "--batch-size",
        **limits(BatchSize),
        help="Pictures at a time, of those of one size.",
    ),
]


@dataclass(frozen=True)
class Also:
    """What is written beside drawn pictures and predictions.json."""

    txt: Annotated[
        bool,
        typer.Option(
            "--txt", help="Also write YOLO text: labels/NAME.txt, with class cx cy w h score."
        ),
    ] = False
    format: Annotated[
        LabelFormat | None,
        typer.Option(
            "--format",
            help="Also write labels to correct or to train on, with the pictures: OUT/FORMAT.",
        ),
    ] = None
    crops: Annotated[
        bool,
        typer.Option(
            "--crops", help="Also write a picture of each detection: OUT/crops/CLASS/NAME-1.jpg."
        ),
    ] = False

    def places(self, out: Path) -> dict[str, Path]:
        """The folders of it, by what they hold."""
        labels = {"labels": out / self.format} if self.format else {}
        return labels | ({"crops": out / "crops"} if self.crops else {})


@dataclass
class Tally:
    """What was detected in one file."""

    frames: int | None = None  # of a video
    names: Counter[str] = field(default_factory=Counter)

    def add(self, prediction: Prediction) -> None:
        """Counts a picture's detections, or a frame's."""
        self.names.update(prediction.names)
        if prediction.frame is not None:
            self.frames = (self.frames or 0) + 1

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.names.items()) or "-"
        return counts if self.frames is None else f"{counts} ({self.frames} frames)"


Pictures = Annotated[
    list[str],
    typer.Argument(help="Pictures, videos, folders of them, and patterns ('pics/*.jpg')."),
]


@grouped
def predict(
    run: Trained,
    pictures: Pictures,
    *,
    out: Annotated[
        Path, typer.Option(help="Folder for annotated pictures and videos, and predictions.json.")
    ] = Path("predictions"),
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Also pictures in the folders of folders.")
    ] = False,
    every: Every = 1,
    threshold: ScoreOrAuto = 0.3,
    ways: Ways,
    batch: Batch = 1,
    also: Also,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Detect objects in pictures and videos:
    annotated copies, and COCO-results JSON with the data set's own ids and names.

    A picture that cannot be read is named, and does not stop the others; of a video what can be
    read is used. Nothing is written over but what an earlier predict left. Exit code: 0 all was
    read, 1 some was not, 2 wrong use.

    Example: detrellis predict runs/tiny-20260101-120000 photo.jpg folder/ --threshold auto --out
    pictures --tta

    Small objects in large pictures: detrellis predict runs/tiny-20260101-120000 aerial.jpg --tiles
    640 --batch 4

    A video: detrellis predict runs/tiny-20260101-120000 clip.mp4 --out annotated --batch 8

    Labels to correct: detrellis predict runs/tiny-20260101-120000 folder/ --format cvat
    """
    from detrellis import api

    tallies: defaultdict[Path | None, Tally] = defaultdict(Tally)
    failures = api.predict(
        run,
        pictures,
        threshold=threshold,
        **ways.chosen(),
        batch_size=batch,
        recursive=recursive,
        every=every,
        out=out,
        **vars(also),
        device=device,
        on_error=_report,
        on_prediction=lambda prediction: tallies[prediction.path].add(prediction),
        progress=True,
    ).failures
    if as_json:
        print((out / "predictions.json").read_text(encoding="utf-8"))
    else:
        _show(tallies, out, also.places(out))
    if failures:
        _end(failures, tallies)


def _report(failure: UnreadablePicture) -> None:
    if IS_MAIN_PROCESS:
        errors.say(("error", "bold red"), f" {failure.why}")


def _end(failures: Sequence[UnreadablePicture], tallies: Mapping[Path | None, Tally]) -> NoReturn:
    """Says how much could not be read, and leaves."""
    from detrellis.predictions.video import is_video

    remedies = " ".join(dict.fromkeys(failure.remedy for failure in failures))
    videos = any(
        path is not None and is_video(path) for path in [*tallies, *(f.path for f in failures)]
    )
    what = (
        "pictures and videos could not be read to their end"
        if videos
        else "pictures could not be read"
    )
    if IS_MAIN_PROCESS:
        errors.say(
            f"{len(failures)} of {len(tallies.keys() | {f.path for f in failures})} {what}. "
            f"{remedies}"
        )
    raise typer.Exit(1)


def _show(tallies: Mapping[Path | None, Tally], out: Path, others: Mapping[str, Path]) -> None:
    table = Table("picture", "detections")
    for name, tally in zip(names_below(list(tallies)), tallies.values(), strict=True):
        table.add_row(Text(name), Text(str(tally)))
    console.print(table)
    console.say(
        f"Pictures and predictions.json: {out}",
        *(f"; {what}: {place}" for what, place in others.items()),
    )


def names_below(paths: Sequence[Path | None]) -> list[str]:
    """The place of each file below the folder that all are in, so that no two are called the same;
    "" where there is no file.
    """
    from detrellis.data.files import below_common_folder

    places = [None if path is None else path.absolute() for path in paths]
    _, names = below_common_folder([place for place in places if place is not None])
    return ["" if place is None else names[place] for place in places]
