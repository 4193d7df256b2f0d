"""What the verbs share: the options that several of them have,
alone and in groups, the console, and JSON on standard output.

A group is a dataclass of options. A verb under `grouped` takes it as one keyword argument, and has
its fields as options in that place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from detrellis import arguments
from detrellis.arguments import limits
from detrellis.errors import UserError
from detrellis.terminal import Terminal

if TYPE_CHECKING:
    from detrellis.data.findings import SkipBad as Skips
    from detrellis.data.layout import DataSource
    from detrellis.engine.evaluate import EvalOptions

IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # under torchrun only one process prints
console = Terminal(quiet=not IS_MAIN_PROCESS)
errors = Terminal(stderr=True)

Data = Annotated[
    Path | None,
    typer.Option(
        help="Data set: a folder in COCO, Roboflow, YOLO, VOC, labelme, VIA or CSV layout."
    ),
]
TrainFile = Annotated[
    Path | None,
    typer.Option(
        "--train", help="COCO or VIA JSON, CSV, or folder of VOC XML or labelme JSON, to train on."
    ),
]
TrainImages = Annotated[
    Path | None, typer.Option(help="Folder of its images, if they are not near it.")
]
ValFile = Annotated[
    Path | None,
    typer.Option(
        "--val", help="COCO or VIA JSON, CSV, or folder of VOC XML or labelme JSON, to evaluate on."
    ),
]
ValImages = Annotated[Path | None, typer.Option(help="Folder of its images.")]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Drop bad images and boxes instead of refusing them (decodes all images).",
    ),
]
KeepPartial = Annotated[
    bool,
    typer.Option(
        "--keep-partial",
        help="With it, keep images that lose an object (they teach it is not there).",
    ),
]


def _epochs_or_auto(text: str) -> int | arguments.Auto:
    """What `--epochs` is given, where it may be auto."""
    least = limits(arguments.Epochs)["min"]
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) >= least:
        return int(text)
    raise typer.BadParameter(f"{text!r} is not auto, nor a whole number of {least} or more")


EpochsOrAuto = Annotated[
    Any,  # an int or "auto": typer knows no unions
    typer.Option(
        parser=_epochs_or_auto,
        metavar="N|auto",
        help="Length of the run, which the schedule follows; auto: by the size of the data set.",
    ),
]
AutoBatch = Annotated[
    bool,
    typer.Option(
        "--auto-batch", help="Take as many images at a time as fit into memory; the step's stay."
    ),
]


def _score_or_auto(text: str) -> float | arguments.Auto:
    """What `--threshold` is given."""
    if text == "auto":
        return "auto"
    bounds = limits(arguments.Score)
    with contextlib.suppress(ValueError):
        if bounds["min"] <= (score := float(text)) <= bounds["max"]:
            return score
    raise typer.BadParameter(
        f"{text!r} is not auto, nor a number from {bounds['min']} to {bounds['max']}"
    )


ScoreOrAuto = Annotated[
    Any,
    typer.Option(
        parser=_score_or_auto,
        metavar="SCORE|auto",
        help=(
            "Lowest score to show; auto: of each class the one with the highest F1 on the run's "
            "validation split."
        ),
    ),
]
Tta = Annotated[
    bool,
    typer.Option(
        "--tta", help="Look at each picture at three sizes and mirrored, and merge what is found."
    ),
]
TtaViews = Annotated[
    str | None,
    typer.Option(
        "--tta-views",
        help=(
            "The same at these short sides: 640,800,flip. A last word says how to merge: "
            "soft_nms, nms or wbf."
        ),
    ),
]
Tiles = Annotated[
    int | None,
    typer.Option(
        min=32,
        help="Look at tiles of so many pixels a side, for small objects in large pictures: 640.",
    ),
]
Overlap = Annotated[
    float,
    typer.Option(
        min=0, max=0.9, help="With --tiles: the share of a side that tiles have in common."
    ),
]
Full = Annotated[
    bool, typer.Option("--full/--tiles-only", help="With --tiles: look at the whole picture, too.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: a GPU if there is one).")
]
Half = Annotated[
    bool,
    typer.Option("--half", help="Products in bfloat16: sooner on a GPU, or a CPU that has AMX."),
]
Workers = Annotated[
    int, typer.Option(**limits(arguments.Workers), help="Processes that load images.")
]
RecipeName = Annotated[
    str | None,
    typer.Argument(help="Recipe name; see `detrellis recipes` (default: that of --weights)."),
]
Weights = Annotated[
    str | None, typer.Option(help="Start from these weights: a run, hf:org/name, a .pth, ...")
]
Boxes = Annotated[
    str | None, typer.Option(help="Take the reference boxes (anchors) alone from these weights.")
]
Trained = Annotated[
    Path,
    typer.Argument(
        help="A run, a weights file, hf:org/name, a Hugging Face folder, or a reference's .pth."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Scale = Annotated[
    arguments.Scale | None, typer.Option(help="The recipe at a size for CPUs and small data.")
]
Schemes = Annotated[
    list[str] | None,
    typer.Option(
        "--scheme",
        help="Training scheme NAME[=N][@UNTIL]: align, group=3, co@0.5 (off after half of the "
        "run); several with commas.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", help="Recipe field: -o optim.lr=2e-4 -o 'data.size=[256, 320]'."),
]
HoldOut = Annotated[
    bool,
    typer.Option(
        "--hold-out",
        help="Validate on a fixed one in five of the training images, where there is no split for it.",
    ),
]
Split = Annotated[arguments.Split, typer.Option(help="Split of the data set.")]
Track = Annotated[
    list[str] | None,
    typer.Option(
        help=(
            "Also log to trackio, wandb or mlflow (several with commas); TensorBoard has it anyhow."
        )
    ),
]
Metric = Annotated[
    arguments.Metric, typer.Option(help="AP as COCO counts it, or as Pascal VOC does at IoU 0.5.")
]
BatchSize = Annotated[int, typer.Option(**limits(arguments.BatchSize), help="Images at a time.")]


@dataclass(frozen=True)
class Files:
    """A data set to train on."""

    data: Data = None
    train: TrainFile = None
    train_images: TrainImages = None
    val: ValFile = None
    val_images: ValImages = None
    hold_out: HoldOut = False

    def named(self) -> dict[str, Path | None]:
        """What names it, as the API takes it."""
        return {name: value for name, value in vars(self).items() if name != "hold_out"}

    def source(self) -> DataSource:
        """The data set; `UserError` where none is named."""
        from detrellis.data.layout import resolve

        source = resolve(**self.named())
        return source.held_out() if self.hold_out else source


@dataclass(frozen=True)
class EvalData:
    """What a trained detector is evaluated on."""

    data: Data = None
    val: ValFile = None
    val_images: ValImages = None
    split: Split = "val"
    batch_size: BatchSize = 4
    skip_bad: SkipBad = False
    keep_partial: KeepPartial = False
    workers: Workers = 2

    def on(self) -> EvalOptions:
        """The options as the API takes them."""
        from detrellis.engine.evaluate import EvalOptions

        options = {**vars(self), "skip_bad": skips(self.skip_bad, self.keep_partial)}
        del options["keep_partial"]
        return EvalOptions(**options)


@dataclass(frozen=True)
class Ways:
    """How pictures are looked at."""

    nms: Annotated[
        float | None,
        typer.Option(
            **limits(arguments.Iou), help="Apply NMS at this IoU: are objects found twice?"
        ),
    ] = None
    tta: Tta = False
    tta_views: TtaViews = None
    tiles: Tiles = None
    overlap: Overlap = 0.2
    full: Full = True
    half: Half = False

    def chosen(self) -> dict[str, Any]:
        """The options as the API takes them."""
        options = {**vars(self), "tta": self.tta if self.tta_views is None else self.tta_views}
        del options["tta_views"]
        return options


def skips(skip_bad: bool, keep_partial: bool) -> Skips:
    """`--skip-bad` and `--keep-partial` as the API takes them."""
    if keep_partial and not skip_bad:
        raise UserError(
            "--keep-partial without --skip-bad", "Add --skip-bad: only then anything is left out."
        )
    return "boxes" if keep_partial else skip_bad


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the options of its groups; see the top of the file."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {
        name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)
    }
    options = [o for p in inspect.signature(verb).parameters.values() for o in _options(p, hints)]

    @functools.wraps(verb)
    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{f.name: values.pop(f.name) for f in dataclasses.fields(kind)})
        verb(**values)

    # What typer reads; both, because it reads both.
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {o.name: o.annotation for o in options}
    return run


def _options(parameter: inspect.Parameter, hints: dict[str, Any]) -> list[inspect.Parameter]:
    """The parameter, or those that the fields of its group make;
    for keywords only, so that options without a default may follow others."""
    kind = hints[parameter.name]
    only = inspect.Parameter.KEYWORD_ONLY
    if not dataclasses.is_dataclass(kind):
        return [parameter.replace(annotation=kind, kind=only)]
    annotations = get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    return [
        inspect.Parameter(f.name, only, default=f.default, annotation=annotations[f.name])
        for f in fields
    ]


def progress_console(as_json: bool) -> Terminal:
    """The console for a verb's progress: with `--json` the standard output belongs to the JSON."""
    return Terminal(stderr=True, quiet=not IS_MAIN_PROCESS) if as_json else console


def print_json(value: Any) -> None:
    """Print a result as JSON, the one thing that a verb with `--json` prints."""
    if IS_MAIN_PROCESS:
        print(json.dumps(value, indent=1))
