"""`predict`: what a run detects in pictures and videos."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from detrellis.arguments import Auto, BatchSize, Count, Iou, LabelFormat, Score, checked
from detrellis.engine.console import track
from detrellis.errors import UserError
from detrellis.loading import load, trained
from detrellis.predictions.inputs import InputPicture, Pictures, find_pictures, without_repeats
from detrellis.predictions.record import (
    OnError,
    Prediction,
    Predictions,
    UnreadablePicture,
    collect_predictions,
)
from detrellis.predictions.save import PredictionFolder
from detrellis.predictions.tiles import Tiling
from detrellis.predictions.video import frames_expected
from detrellis.report.thresholds import class_thresholds


@checked
def predict(
    run: str | Path,
    pictures: Pictures,
    *,
    threshold: Score | Auto = 0.3,
    nms: Iou | None = None,
    tta: bool | str = False,
    tiles: int | None = None,
    overlap: float = 0.2,
    full: bool = True,
    batch_size: BatchSize = 1,
    recursive: bool = False,
    every: Count = 1,
    out: str | Path | None = None,
    txt: bool = False,
    format: LabelFormat | None = None,
    crops: bool = False,
    device: str | None = None,
    half: bool = False,
    on_error: OnError = "raise",
    on_prediction: Callable[[Prediction], object] | None = None,
    progress: bool = False,
) -> Predictions:
    """Detections of a run in pictures: files, folders, patterns, arrays, as `Model.predict` gives.

    Of a video (`pip install 'detrellis[video]'`) each frame gives a prediction, or one in `every`,
    with its `frame` and `time`. `on_prediction` is called with each prediction as it comes, which
    is not kept then: of long videos.

    `threshold="auto"` takes for each class the one with the highest F1 on the run's own validation
    split, which the end of `train`, and `evaluate`, store in the run's `report.json`. `tiles` looks
    at each picture in tiles of so many pixels a side, which share `overlap` of it, and with `full`
    at the whole as well (`predictions/tiles.py`). `half` computes products in bfloat16.

    With `out`, annotated pictures and videos, and `predictions.json`, go there, and with `txt` YOLO
    text (`labels/NAME.txt`: class, cx, cy, w, h, score) and `classes.txt`. `format` writes a label
    set for a labelling tool or for training to `out/FORMAT`, with copies of the pictures
    (`predictions/label_formats.py`), and `crops` a picture of each detection to `out/crops/CLASS`.
    A file that is found in several ways is looked at once. Raises `UserError` before any work where
    an input, or what no earlier call made, would be overwritten.
    """
    place = trained(run)
    tiling = None if tiles is None else Tiling(tiles, overlap, full)
    if out is None and (format or crops or txt):
        raise UserError("files are to be written, and no folder is named", "Say where: out=FOLDER.")
    inputs = without_repeats(find_pictures(pictures, recursive))
    given = [replace(picture, every=every) for picture in inputs]
    folder = None if out is None else PredictionFolder(Path(out), given, txt, format, crops)
    given = given if folder is None else folder.pictures
    model = load(place, device=device, half=half).fused()
    least = class_thresholds(place, model.classes) if threshold == "auto" else threshold

    def detect(some: Iterable[InputPicture]) -> Generator[Prediction | UnreadablePicture]:
        return model.detect(some, least, nms, batch_size, tta, tiling)

    work = detect(given) if folder is None else folder.save(detect, model.classes, model.data)
    # Ctrl-C may come anywhere; what was predicted is written then too
    with contextlib.closing(work):
        shown = track(work, "predict", expected(given, every), progress)
        return collect_predictions(shown, on_error, on_prediction)


def expected(given: Sequence[InputPicture], every: int) -> int:
    """How many predictions there will be: one a picture, and one in `every` frames of a video."""
    return sum(-(-frames_expected(p.path) // every) if p.path and p.is_video else 1 for p in given)
