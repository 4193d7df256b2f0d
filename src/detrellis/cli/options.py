"""What the verbs share: the options that several of them have, the console, and JSON on standard output."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

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
Weights = Annotated[str | None, typer.Option(help="Start from these weights: a run, hf:org/name, a .pth, ...")]
Boxes = Annotated[str | None, typer.Option(help="Take the reference boxes (anchors) alone from these weights.")]
Trained = Annotated[
    Path, typer.Argument(help="A run, a weights file, hf:org/name, a Hugging Face folder, or a reference's .pth.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Scale = Annotated[Literal["tiny"] | None, typer.Option(help="The recipe at a size for CPUs and small data.")]
Schemes = Annotated[list[str] | None, typer.Option("--scheme", help="Training scheme NAME[=N], several with commas.")]
Overrides = Annotated[list[str] | None, typer.Option("-o", help="Recipe field: key.sub=value. May be repeated.")]
Split = Annotated[Literal["train", "val", "test"], typer.Option(help="Split of the data set.")]
Metric = Annotated[Literal["coco", "voc"], typer.Option(help="AP as COCO counts it, or as Pascal VOC does at IoU 0.5.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]


def print_json(value: Any) -> None:
    """The one thing that a verb with `--json` prints."""
    if LEADS:
        print(json.dumps(value, indent=1))
