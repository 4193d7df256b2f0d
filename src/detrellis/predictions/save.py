"""The files of `predict --out`: drawn pictures, `predictions.json` as COCO results;
YOLO text, labels and crops if wanted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from detrellis.arguments import LabelFormat
from detrellis.data.classes import ClassMap
from detrellis.data.files import files_in
from detrellis.data.layout import DataSource
from detrellis.errors import UserError
from detrellis.outputs import Outputs, jpeg
from detrellis.predictions.crops import CROPS, CropFolder, folder_names
from detrellis.predictions.inputs import InputPicture
from detrellis.predictions.label_formats import FORMATS
from detrellis.predictions.labels import LabelFolder
from detrellis.predictions.record import Prediction, UnreadablePicture
from detrellis.predictions.video import frame_rate
from detrellis.predictions.video_writer import VideoWriter

RESULTS, CLASSES = "predictions.json", "classes.txt"
SPOOLED = 1 << 24  # bytes of results that are kept in memory


class PredictionFolder:
    """Where the predictions of `pictures` go: `NAME.jpg` for each, `NAME.mp4` for a video, and with
    `txt` `labels/NAME.txt`; `labels` is the format of a folder of labels. A video's frames are
    called `NAME/000123`.

    What an earlier call wrote is left out of `pictures`, unless it was named itself. Raises
    `UserError` where something would be lost, before any work; see `outputs.py`.
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
        earlier = [
            p.listed and p.path is not None and any(f.made(p.path) for f in folders)
            for p in pictures
        ]
        self.pictures = [p for p, written in zip(pictures, earlier, strict=True) if not written]
        if pictures and not self.pictures:
            raise UserError(
                f"{out}: an earlier call wrote all of these pictures",
                "Name others, or take another --out.",
            )
        self.names = output_names(self.pictures)
        entries = list(zip(self.pictures, self.names, strict=True))
        files = [
            RESULTS,
            *(f"{name}.{'mp4' if picture.is_video else 'jpg'}" for picture, name in entries),
        ]
        if txt:
            files += [
                CLASSES,
                *(f"labels/{name}.txt" for picture, name in entries if not picture.is_video),
            ]
            files += [
                file.relative_to(out).as_posix()
                for picture, name in entries
                if picture.is_video
                for file in files_in(out / "labels" / name, ".txt")
            ]
        inputs = [p.path for p in self.pictures if p.path is not None]
        self.outputs.ready(files, inputs)
        self.labels = None if labels is None else LabelFolder(out, labels, inputs)
        self.crops = CropFolder(out, inputs) if crops else None

    def save(
        self,
        detect: Callable[[Iterable[InputPicture]], Iterable[Result]],
        classes: ClassMap,
        data: Mapping[str, Any] | None,
    ) -> Generator[Result]:
        """Pass on what `detect` gives of each picture and frame,
        in order, and write its files as it comes.

        `predictions.json`, labels and a video's end are written also where the end comes early. A
        picture that belongs to the data set that the model was trained on (`data`: the
        `DataSource`, as `to_dict` gives it) keeps its image id there; others count on from the
        highest one.
        """
        id_of, folders = image_ids(self.pictures, data), folder_names(classes.names)
        for part in (self.labels, self.crops):
            if part is not None:
                part.start()
        if self.txt:
            self.outputs.write(
                CLASSES, "".join(f"{' '.join(name.split())}\n" for name in classes.names)
            )
        entries = zip(self.pictures, self.names, strict=True)
        with JsonList() as rows:
            files = _Files(self, rows, id_of, classes, folders)
            try:
                for of_videos, group in itertools.groupby(
                    entries, key=lambda entry: entry[0].is_video
                ):
                    saved = files.videos if of_videos else files.pictures
                    yield from saved(list(group), detect)
            finally:
                self.outputs.write_with(RESULTS, rows.copy)
                if self.labels is not None:
                    self.labels.write(classes)


Result = Prediction | UnreadablePicture
Detect = Callable[[Iterable[InputPicture]], Iterable[Result]]
Entries = Sequence[tuple[InputPicture, str]]  # with what its files are called


@dataclass(frozen=True)
class _Files:
    """Writes what belongs to each result."""

    folder: PredictionFolder
    rows: JsonList
    id_of: Callable[[InputPicture], int]
    classes: ClassMap
    class_folders: Sequence[str]

    def pictures(self, entries: Entries, detect: Detect) -> Generator[Result]:
        """Those of pictures: each drawn, as a JPEG."""
        results = detect([picture for picture, _ in entries])
        for (picture, name), result in zip(entries, results, strict=True):
            image_id = self.id_of(picture)
            if isinstance(result, Prediction):
                self.folder.outputs.write(f"{name}.jpg", jpeg(result.draw(self.classes.names)))
                self._note(picture, name, image_id, result)
            yield result

    def videos(self, entries: Entries, detect: Detect) -> Generator[Result]:
        """Those of videos: each drawn, as another one."""
        for video, name in entries:
            yield from self._video(video, name, detect([video]))

    def _video(
        self, video: InputPicture, name: str, results: Iterable[Result]
    ) -> Generator[Result]:
        assert video.path is not None
        rate = frame_rate(video.path) / video.every
        with self.folder.outputs.growing(f"{name}.mp4") as path, VideoWriter(path, rate) as film:
            for result in results:
                if isinstance(result, Prediction):
                    assert result.time is not None
                    film.add(result.draw(self.classes.names, same_size=True), result.time)
                    self._note(video, f"{name}/{result.frame:06d}", self.id_of(video), result)
                yield result

    def _note(
        self, picture: InputPicture, name: str, image_id: int, prediction: Prediction
    ) -> None:
        """What is the same for pictures and frames."""
        for row in prediction.to_coco(image_id):
            self.rows.add(row)
        if self.folder.txt:
            self.folder.outputs.write(f"labels/{name}.txt", prediction.to_yolo())
        if self.folder.crops is not None:
            self.folder.crops.add(name, prediction, self.class_folders)
        if self.folder.labels is not None:
            self.folder.labels.add(picture, name, image_id, prediction)


class JsonList:
    """A list in JSON that need not fit into memory, as `json.dumps(rows, indent=1)` writes it."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(SPOOLED, "w+", encoding="utf-8")  # noqa: SIM115, closed by the block
        self._empty = True

    def __enter__(self) -> JsonList:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """One more element."""
        self._file.write("[" if self._empty else ",")
        self._file.write(json.dumps([row], indent=1)[1:-2])
        self._empty = False

    def copy(self, path: Path) -> None:
        """Write the list to a file."""
        self._file.seek(0)
        with path.open("w", encoding="utf-8") as file:
            shutil.copyfileobj(self._file, file)
            file.write("[]" if self._empty else "\n]")


def output_names(pictures: Sequence[InputPicture]) -> list[str]:
    """What the files of each picture are called, without suffix, all different;
    their order does not matter.

    The picture's place in the folder that was given, or its name: `sub/photo`, `photo`. Where two
    would be the same, each gets its suffix (`photo.jpg`, `photo.png`), or folders that tell them
    apart (`a/photo`, `b/photo`). Pictures without a file are counted: `picture-1`.
    """
    levels = [0] * len(pictures)
    while True:
        positions = defaultdict(list)
        names = []
        for position, (picture, level) in enumerate(zip(pictures, levels, strict=True)):
            names.append(_output_name(picture, position, level))
            # File systems may not tell "A" from "a"
            positions[names[-1].casefold()].append(position)
        clashes = [position for group in positions.values() if len(group) > 1 for position in group]
        if not clashes:
            return names
        for position in clashes:
            levels[position] += 1


def _output_name(picture: InputPicture, position: int, level: int) -> str:
    """The shortest name, and at each further level a longer one;
    at last with the picture's number.
    """
    if picture.path is None:
        return f"picture-{position + 1}" + "-" * level
    folders = Path(os.path.abspath(picture.path)).parts[1:-1]
    depth, with_suffix = divmod(level, 2)
    if depth > len(folders):
        return f"{'/'.join(folders)}/{picture.path.name}-{position + 1}" + "-" * level
    place = picture.below if depth == 0 else PurePath(*folders[-depth:], picture.path.name)
    return (place if with_suffix else place.with_suffix("")).as_posix()


def image_ids(
    pictures: Sequence[InputPicture], data: Mapping[str, Any] | None
) -> Callable[[InputPicture], int]:
    """Gives each picture or frame, when it is asked, an image id: the data set's, where it holds
    the picture, else a new one, higher than those."""
    known: dict[Path, int] = {}
    names = {picture.path.name for picture in pictures if picture.path is not None}
    highest = 0
    if data is not None:
        with contextlib.suppress(UserError):  # moved or deleted since: then nothing is known
            for raw in DataSource.from_dict(data).load_all().values():
                highest = max(highest, int(raw.image_ids.max(initial=0)))
                rows = [
                    row
                    for row, name in enumerate(raw.file_names)
                    if os.path.basename(name) in names
                ]
                known |= {raw.path(row).resolve(): int(raw.image_ids[row]) for row in rows}
    new_ids = itertools.count(highest + 1)

    def id_of(picture: InputPicture) -> int:
        known_id = None if picture.path is None else known.get(picture.path.resolve())
        return next(new_ids) if known_id is None else known_id

    return id_of
