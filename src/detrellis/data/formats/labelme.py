"""labelme's layout: a JSON file for each picture, with `shapes` and `imagePath`.

Rectangles, polygons, circles and masks give the box around them; points and lines have none and are counted. `train/`,
`val/` and `test/` are splits; without them a fixed four in five train, as in Pascal VOC.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.files import list_images, map_threads, read_text, subfolders, walk
from detrellis.data.formats.lookup import SPLIT_WORDS, fold, renaming_notes
from detrellis.data.formats.named_classes import Box, Record, Thing, class_names, dataset
from detrellis.data.formats.outlines import around, around_ellipse
from detrellis.data.formats.pictures import Wanted, image_folder, pictures_of, spread
from detrellis.data.records import RawDataset
from detrellis.data.splits import HELD_OUT, SplitFiles, held_out
from detrellis.errors import UserError


class Parsed(NamedTuple):
    """One JSON file."""

    image: str  # `imagePath`
    size: tuple[int, int]
    things: list[Thing]
    skipped: Counter[str]  # shapes without a box, by kind
    problem: str = ""


def is_labelme(file: Path) -> bool:
    """Whether it is one of labelme's files."""
    try:
        content = json.loads(read_text(file))
    except (UserError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def find_labelme(data: Path, given: Mapping[str, Path | None]) -> dict[str, SplitFiles] | None:
    """The splits of a folder with labelme's JSON files; None where there are none."""
    files = _json_below(data)
    if not any(is_labelme(file) for file in spread(files, 8)):
        return None
    folders = {SPLIT_WORDS[fold(f.name)]: f for f in subfolders(data, 2) if fold(f.name) in SPLIT_WORDS}
    own = {split: f for split, f in folders.items() if _json_below(f)}
    if "train" in own:
        return {split: SplitFiles(f, (given.get(split) or _images_of(f, data),)) for split, f in own.items()}
    images = given.get("train") or _images_of(data, data)
    return {part: SplitFiles(data, (given.get(part) or images,), part=part) for part in ("train", "val")}


def labelme_files(folder: Path, split: str, given: Mapping[str, Path | None]) -> SplitFiles:
    """A folder of JSON files that is one split as a whole."""
    folder = folder.resolve()
    images = given.get(split) or given.get("train") or _images_of(folder, folder)
    return SplitFiles(folder, (images.resolve(),))


def _json_below(folder: Path) -> list[Path]:
    return sorted(Path(parent, n) for parent, names in walk(folder) for n in names if fold(n).endswith(".json"))


def _images_of(annotations: Path, data: Path) -> Path:
    sample = spread(_json_below(annotations))
    wanted = [Wanted(_stem(file, annotations), _parse(file).image) for file in sample]
    return image_folder(annotations, (annotations, data, annotations.parent), wanted)


def _stem(file: Path, annotations: Path) -> str:
    return file.relative_to(annotations).with_suffix("").as_posix()


def read_labelme(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits; training is always read, for it says which name has which id."""
    read = {split: _split(split, splits[split]) for split in dict.fromkeys(["train", *wanted]) if split in splits}
    names = class_names({split: records for split, (records, _) in read.items()}, wanted)
    return {
        split: dataset(split, splits[split].annotations, splits[split].images[0], read[split][0], names[split], notes)
        for split, notes in ((split, read[split][1]) for split in wanted)
    }


def _split(split: str, files: SplitFiles) -> tuple[list[Record], list[Finding]]:
    everything = _json_below(files.annotations)
    own = everything
    if files.part is not None:
        out = held_out(file.stem for file in everything)
        own = [file for file in everything if (file.stem in out) == (files.part == "val")]
    parsed = map_threads(_parse, own)
    pictures = pictures_of(
        [Wanted(_stem(f, files.annotations), p.image) for f, p in zip(own, parsed, strict=True)], files.images[0]
    )
    records, notes = [], list(renaming_notes(split, files.annotations, pictures))
    for file, name, found in zip(own, pictures.names, parsed, strict=True):
        if found.problem and not (files.images[0] / name).is_file():
            notes.append(finding("unreadable-labels", split, file, found.problem))
        else:
            records.append(Record(file, name, found.size, found.things, found.problem))
    return records, [*notes, *_notes(split, files, parsed, everything)]


def _notes(split: str, files: SplitFiles, parsed: Sequence[Parsed], everything: Sequence[Path]) -> list[Finding]:
    found = skipped_shapes(split, files.annotations, sum((p.skipped for p in parsed), Counter()))
    if split == "train" and files.part is not None:
        what = f"no folders of splits: a fixed {HELD_OUT - 1} in {HELD_OUT} images train, the others validate"
        found.append(finding("layout", split, files.annotations, what))
    if split == "train" or files.part is None:
        stems = {fold(file.stem) for file in everything} | {fold(Path(p.image).stem) for p in parsed}
        pictures = list_images(files.images[0])
        bare = [p for p in pictures if fold(p.stem) not in stems]
        if bare:
            what = f"{len(bare)} of {len(pictures)} pictures have no JSON file and are left out; the first: {bare[0]}"
            found.append(finding("unlabelled-images", split, files.images[0], what, count=len(bare)))
    return found


def skipped_shapes(split: str, source: Path, skipped: Counter[str]) -> list[Finding]:
    """What is said of shapes that have no box."""
    if not skipped:
        return []
    listed = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
    what = f"{skipped.total()} shapes have no box and are left out: {listed}"
    return [finding("skipped-shapes", split, source, what, count=skipped.total())]


def _parse(file: Path) -> Parsed:
    """What the file says, or why it says nothing."""
    try:
        content = json.loads(read_text(file))
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            raise ValueError("JSON of another kind: it has no list of `shapes`")
        things, skipped = [], Counter[str]()
        for number, shape in enumerate(content["shapes"], start=1):
            box, kind = _box(shape, number)
            if box is None:
                skipped[kind] += 1
            else:
                things.append(Thing(str(shape["label"]).strip(), box, number))
        size = (_whole(content.get("imageHeight")), _whole(content.get("imageWidth")))
        return Parsed(str(content.get("imagePath") or ""), size, things, skipped)
    except UserError as error:
        return Parsed("", (0, 0), [], Counter(), error.message.removeprefix(f"{file}: "))
    except (ValueError, RecursionError) as error:
        return Parsed("", (0, 0), [], Counter(), f"not labelme's JSON ({error})")


def _box(shape: Any, number: int) -> tuple[Box | None, str]:
    """The box around a shape, None where its kind has none, and the kind. Raises `ValueError` in words."""
    if not isinstance(shape, dict) or not str(shape.get("label") or "").strip():
        raise ValueError(f"shape {number} has no label")
    kind = str(shape.get("shape_type") or "polygon")
    try:
        points = [(float(p[0]), float(p[1])) for p in shape["points"]]
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"shape {number} has no points") from None
    if kind == "circle" and len(points) == 2:
        radius = math.dist(*points)
        return around_ellipse(*points[0], radius, radius), kind
    least = {"rectangle": 2, "mask": 2, "polygon": 3, "oriented_rectangle": 3}.get(kind)
    return (around(points), kind) if least is not None and len(points) >= least else (None, kind)


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else 0
