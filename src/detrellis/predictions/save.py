"""What `predict --out` leaves: drawn pictures, `predictions.json` in COCO's results format, and YOLO text if wanted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from detrellis.data.layout import DataSource
from detrellis.errors import UserError
from detrellis.outputs import Outputs, jpeg
from detrellis.predictions.inputs import Given
from detrellis.predictions.record import Failure, Prediction

RESULTS, CLASSES = "predictions.json", "classes.txt"


class Folder:
    """Where the predictions of `given` go: `NAME.jpg` for each picture, and with `txt` `labels/NAME.txt`.

    What an earlier call drew is left out of `given`, unless it was named itself. Raises `UserError` where something
    would be lost, before any work; see `outputs.py`.
    """

    def __init__(self, out: Path, given: Sequence[Given], txt: bool = False) -> None:
        self.outputs, self.txt = Outputs(out), txt
        self.given = [g for g in given if not (g.listed and g.path is not None and self.outputs.made(g.path))]
        if given and not self.given:
            raise UserError(f"{out}: all pictures are what an earlier call drew", "Name other pictures.")
        self.names = output_names(self.given)
        files = [RESULTS, *(f"{name}.jpg" for name in self.names)]
        if txt:
            files += [CLASSES, *(f"labels/{name}.txt" for name in self.names)]
        self.outputs.ready(files, inputs=[g.path for g in self.given if g.path is not None])

    def save(
        self, found: Iterable[Prediction | Failure], class_names: Sequence[str], data: Mapping[str, Any] | None
    ) -> Generator[Prediction | Failure]:
        """Pass on what was found in each picture of `given`, in order, and write its files as it comes.

        `predictions.json` is written at the end, also where that comes early. A picture that belongs to the data set
        that the model was trained on (`data`: the `DataSource`, as `to_dict` gives it) keeps its image id there; others
        count on from the highest one.
        """
        ids = image_ids(self.given, data)
        rows: list[dict[str, Any]] = []
        if self.txt:
            self.outputs.write(CLASSES, "".join(f"{' '.join(name.split())}\n" for name in class_names))
        try:
            for name, image_id, one in zip(self.names, ids, found, strict=True):
                if isinstance(one, Prediction):
                    rows += one.to_coco(image_id)
                    self._write(name, one, class_names)
                yield one
        finally:
            self.outputs.write(RESULTS, json.dumps(rows, indent=1))

    def _write(self, name: str, one: Prediction, class_names: Sequence[str]) -> None:
        self.outputs.write(f"{name}.jpg", jpeg(one.draw(class_names)))
        if self.txt:
            self.outputs.write(f"labels/{name}.txt", one.to_yolo())


def output_names(given: Sequence[Given]) -> list[str]:
    """What the files of each picture are called, without suffix, all different; their order does not matter.

    The picture's place in the folder that was given, or its name: `sub/photo`, `photo`. Where two would be the same,
    each gets its suffix (`photo.jpg`, `photo.png`), or folders that tell them apart (`a/photo`, `b/photo`). Pictures
    without a file are counted: `picture-1`.
    """
    levels = [0] * len(given)
    while True:
        names = [_called(one, position, level) for position, (one, level) in enumerate(zip(given, levels, strict=True))]
        groups = defaultdict(list)
        for position, name in enumerate(names):
            groups[name.casefold()].append(position)  # file systems may not tell "A" from "a"
        clashes = [position for group in groups.values() if len(group) > 1 for position in group]
        if not clashes:
            return names
        for position in clashes:
            levels[position] += 1


def _called(given: Given, position: int, level: int) -> str:
    """The shortest name, and at each further level a longer one; at last with the picture's number."""
    if given.path is None:
        return f"picture-{position + 1}" + "-" * level
    folders = Path(os.path.abspath(given.path)).parts[1:-1]
    depth, with_suffix = divmod(level, 2)
    if depth > len(folders):
        return f"{'/'.join(folders)}/{given.path.name}-{position + 1}" + "-" * level
    place = given.below if depth == 0 else PurePath(*folders[-depth:], given.path.name)
    return (place if with_suffix else place.with_suffix("")).as_posix()


def image_ids(given: Sequence[Given], data: Mapping[str, Any] | None) -> list[int]:
    """The data set's own id of each picture, where the data set is still there and holds it."""
    known: dict[Path, int] = {}
    names = {g.path.name for g in given if g.path is not None}
    highest = 0
    if data is not None:
        with contextlib.suppress(UserError):  # moved or deleted since: then nothing is known
            for raw in DataSource.from_dict(data).load_all().values():
                highest = max(highest, int(raw.image_ids.max(initial=0)))
                rows = [row for row, name in enumerate(raw.file_names) if os.path.basename(name) in names]
                known |= {raw.path(row).resolve(): int(raw.image_ids[row]) for row in rows}
    fresh = itertools.count(highest + 1)
    places = [None if g.path is None else g.path.resolve() for g in given]
    return [known[place] if place is not None and place in known else next(fresh) for place in places]
