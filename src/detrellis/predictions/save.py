"""The files of `predict --out`: drawn pictures, `predictions.json` as COCO results; YOLO text, labels and crops if
wanted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from detrellis.arguments import LabelFormat
from detrellis.data.classes import ClassMap
from detrellis.data.layout import DataSource
from detrellis.errors import UserError
from detrellis.outputs import Outputs, jpeg
from detrellis.predictions.crops import CROPS, CropFolder, folder_names
from detrellis.predictions.inputs import InputPicture
from detrellis.predictions.label_formats import FORMATS
from detrellis.predictions.labels import LabelFolder
from detrellis.predictions.record import Prediction, UnreadablePicture

RESULTS, CLASSES = "predictions.json", "classes.txt"


class PredictionFolder:
    """Where the predictions of `pictures` go: `NAME.jpg` for each, and with `txt` `labels/NAME.txt`; `labels` is the
    format of a folder of labels.

    What an earlier call wrote is left out of `pictures`, unless it was named itself. Raises `UserError` where something
    would be lost, before any work; see `outputs.py`.
    """

    def __init__(
        self,
        out: Path,
        pictures: Sequence[InputPicture],
        txt: bool = False,
        labels: LabelFormat | None = None,
        crops: bool = False,
    ) -> None:
        self.outputs, self.txt = Outputs(out), txt
        folders = [self.outputs, *(Outputs(out / name) for name in (CROPS, *FORMATS))]
        earlier = [p.listed and p.path is not None and any(f.made(p.path) for f in folders) for p in pictures]
        self.pictures = [p for p, written in zip(pictures, earlier, strict=True) if not written]
        if pictures and not self.pictures:
            raise UserError(
                f"{out}: an earlier call wrote all of these pictures", "Name others, or take another --out."
            )
        self.names = output_names(self.pictures)
        files = [RESULTS, *(f"{name}.jpg" for name in self.names)]
        if txt:
            files += [CLASSES, *(f"labels/{name}.txt" for name in self.names)]
        inputs = [p.path for p in self.pictures if p.path is not None]
        self.outputs.ready(files, inputs)
        self.labels = None if labels is None else LabelFolder(out, labels, inputs)
        self.crops = CropFolder(out, inputs) if crops else None

    def save(
        self,
        results: Iterable[Prediction | UnreadablePicture],
        classes: ClassMap,
        data: Mapping[str, Any] | None,
    ) -> Generator[Prediction | UnreadablePicture]:
        """Pass on the result of each picture, in order, and write its files as it comes.

        `predictions.json` is written at the end, also where that comes early. A picture that belongs to the data set
        that the model was trained on (`data`: the `DataSource`, as `to_dict` gives it) keeps its image id there; others
        count on from the highest one.
        """
        ids, folders = image_ids(self.pictures, data), folder_names(classes.names)
        rows: list[dict[str, Any]] = []
        for part in (self.labels, self.crops):
            if part is not None:
                part.start()
        if self.txt:
            self.outputs.write(CLASSES, "".join(f"{' '.join(name.split())}\n" for name in classes.names))
        try:
            for picture, name, image_id, result in zip(self.pictures, self.names, ids, results, strict=True):
                if isinstance(result, Prediction):
                    rows += result.to_coco(image_id)
                    self._write(name, result, classes, folders)
                if isinstance(result, Prediction) and self.labels is not None:
                    self.labels.add(picture, name, image_id, result)
                yield result
        finally:
            self.outputs.write(RESULTS, json.dumps(rows, indent=1))
            if self.labels is not None:
                self.labels.write(classes)

    def _write(self, name: str, prediction: Prediction, classes: ClassMap, folders: Sequence[str]) -> None:
        self.outputs.write(f"{name}.jpg", jpeg(prediction.draw(classes.names)))
        if self.txt:
            self.outputs.write(f"labels/{name}.txt", prediction.to_yolo())
        if self.crops is not None:
            self.crops.add(name, prediction, folders)


def output_names(pictures: Sequence[InputPicture]) -> list[str]:
    """What the files of each picture are called, without suffix, all different; their order does not matter.

    The picture's place in the folder that was given, or its name: `sub/photo`, `photo`. Where two would be the same,
    each gets its suffix (`photo.jpg`, `photo.png`), or folders that tell them apart (`a/photo`, `b/photo`). Pictures
    without a file are counted: `picture-1`.
    """
    levels = [0] * len(pictures)
    while True:
        positions = defaultdict(list)
        names = []
        for position, (picture, level) in enumerate(zip(pictures, levels, strict=True)):
            names.append(_output_name(picture, position, level))
            positions[names[-1].casefold()].append(position)  # file systems may not tell "A" from "a"
        clashes = [position for group in positions.values() if len(group) > 1 for position in group]
        if not clashes:
            return names
        for position in clashes:
            levels[position] += 1


def _output_name(picture: InputPicture, position: int, level: int) -> str:
    """The shortest name, and at each further level a longer one; at last with the picture's number."""
    if picture.path is None:
        return f"picture-{position + 1}" + "-" * level
    folders = Path(os.path.abspath(picture.path)).parts[1:-1]
    depth, with_suffix = divmod(level, 2)
    if depth > len(folders):
        return f"{'/'.join(folders)}/{picture.path.name}-{position + 1}" + "-" * level
    place = picture.below if depth == 0 else PurePath(*folders[-depth:], picture.path.name)
    return (place if with_suffix else place.with_suffix("")).as_posix()


def image_ids(pictures: Sequence[InputPicture], data: Mapping[str, Any] | None) -> list[int]:
    """An image id for each picture: the data set's, where it holds the picture, else a higher one."""
    known: dict[Path, int] = {}
    names = {picture.path.name for picture in pictures if picture.path is not None}
    highest = 0
    if data is not None:
        with contextlib.suppress(UserError):  # moved or deleted since: then nothing is known
            for raw in DataSource.from_dict(data).load_all().values():
                highest = max(highest, int(raw.image_ids.max(initial=0)))
                rows = [row for row, name in enumerate(raw.file_names) if os.path.basename(name) in names]
                known |= {raw.path(row).resolve(): int(raw.image_ids[row]) for row in rows}
    new_ids = itertools.count(highest + 1)
    ids = []
    for picture in pictures:
        known_id = None if picture.path is None else known.get(picture.path.resolve())
        ids.append(next(new_ids) if known_id is None else known_id)
    return ids
