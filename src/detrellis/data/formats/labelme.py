"""labelme's layout: a JSON file for each picture, with `shapes` and `imagePath`.

Rectangles, polygons, circles and masks give the box around them, those of one label and `group_id`
together; points and lines have none and are counted. All but rectangles are outlines, too.
`train/`, `val/` and `test/` are splits; without them a fixed four in five train, as in Pascal VOC.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from detrellis.data.files import (
    files_below,
    list_images,
    map_threads,
    read_json,
    stem_below,
    subfolders,
)
from detrellis.data.findings import Finding, finding
from detrellis.data.formats import named_classes as named
from detrellis.data.formats.lookup import SPLIT_WORDS, fold
from detrellis.data.formats.pictures import GivenImages, PictureName, image_folder, spread
from detrellis.data.formats.segmentation import run_lengths_of, united
from detrellis.data.records import RawDataset
from detrellis.data.splits import SplitFiles, fixed_parts_note, select_part
from detrellis.errors import UserError
from detrellis.rle import Size

# Of shapes that have a box
FEWEST_POINTS = {"rectangle": 2, "mask": 2, "polygon": 3, "oriented_rectangle": 3}


EXTRACT = (
    "Write each picture beside its JSON file, as a file of the name that `imagePath` says, with "
    "the bytes that base64.b64decode makes of `imageData`."
)


class LabelmeFile(NamedTuple):
    """One JSON file of labelme."""

    picture: named.AnnotatedImage  # whose name is `imagePath`
    skipped: Counter[str]  # shapes without a box, by kind
    embedded: bool = False  # whether the picture itself is in the file


# Finding


def is_labelme(file: Path) -> bool:
    """Whether it is one of labelme's files."""
    try:
        content = read_json(file)
    except UserError:
        return False
    return (
        isinstance(content, dict)
        and isinstance(content.get("shapes"), list)
        and "imagePath" in content
    )


def find_labelme(data: Path, given: GivenImages) -> dict[str, SplitFiles] | None:
    """The splits of a folder with labelme's JSON files; None where there are none."""
    files = files_below(data, ".json")
    if not any(is_labelme(file) for file in spread(files, 8)):
        return None
    by_split = {
        SPLIT_WORDS[fold(f.name)]: f for f in subfolders(data, 2) if fold(f.name) in SPLIT_WORDS
    }
    folders = {split: folder for split, folder in by_split.items() if files_below(folder, ".json")}
    if "train" in folders:
        return {
            split: SplitFiles(folder, (given.get(split) or _images_of(folder, data),))
            for split, folder in folders.items()
        }
    images = given.get("train") or _images_of(data, data)
    return {
        part: SplitFiles(data, (given.get(part) or images,), part=part) for part in ("train", "val")
    }


def labelme_files(folder: Path, split: str, given: GivenImages) -> SplitFiles:
    """A folder of JSON files that is one split as a whole."""
    folder = folder.resolve()
    images = given.get(split) or given.get("train") or _images_of(folder, folder)
    return SplitFiles(folder, (images.resolve(),))


def _images_of(annotations: Path, data: Path) -> Path:
    parsed = [_parse(file) for file in spread(files_below(annotations, ".json"))]
    pictures = [PictureName(stem_below(annotations, p.file), p.image) for p, *_ in parsed]
    try:
        return image_folder(annotations, (annotations, data, annotations.parent), pictures)
    except UserError as error:
        if not any(content.embedded for content in parsed):
            raise
        what = f"{error.message}\nThey are in the JSON files (`imageData`), and not read there."
        raise UserError(what, EXTRACT) from None


# Reading


def read_labelme(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits. Training is always read: it says which name has which id."""
    annotations = {
        split: _of_split(split, splits[split]) for split in named.with_training(splits, wanted)
    }
    return named.datasets(splits, wanted, annotations)


def _of_split(split: str, files: SplitFiles) -> named.SplitAnnotations:
    everything = files_below(files.annotations, ".json")
    json_files = select_part(everything, lambda file: file.stem, files.part)
    parsed = map_threads(_parse, json_files)
    annotations = named.with_pictures(split, files, [content.picture for content in parsed])
    notes = named.skipped_shapes(
        split, files.annotations, sum((content.skipped for content in parsed), Counter())
    )
    notes += fixed_parts_note(split, files, "no folders of splits")
    if split == "train" or files.part is None:
        notes += _unlabelled(split, files, parsed, everything)
    return annotations.with_findings(notes)


def _unlabelled(
    split: str, files: SplitFiles, parsed: Sequence[LabelmeFile], everything: Sequence[Path]
) -> list[Finding]:
    """Pictures of the folder that have no JSON file:
    what they show is unknown, so that they are left out.
    """
    stems = {fold(file.stem) for file in everything} | {
        fold(Path(content.picture.image).stem) for content in parsed
    }
    pictures = list_images(files.images[0])
    bare = [picture for picture in pictures if fold(picture.stem) not in stems]
    if not bare:
        return []
    what = (
        f"{len(bare)} of {len(pictures)} pictures have no JSON file and are left out; the first: "
        f"{bare[0]}"
    )
    return [finding("unlabelled-images", split, files.images[0], what, count=len(bare))]


def _parse(file: Path) -> LabelmeFile:
    """What the file says, or why it says nothing."""
    try:
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            raise ValueError("JSON of another kind: it has no list of `shapes`")
        size = (_pixels(content.get("imageHeight")), _pixels(content.get("imageWidth")))
        objects, skipped = _objects(content["shapes"], size)
        picture = named.AnnotatedImage(file, str(content.get("imagePath") or ""), size, objects)
        return LabelmeFile(picture, skipped, bool(content.get("imageData")))
    except UserError as error:
        problem = error.message.removeprefix(f"{file}: ")
    except ValueError as error:
        problem = f"not labelme's JSON ({error})"
    return LabelmeFile(named.AnnotatedImage(file, "", (0, 0), [], problem), Counter())


def _objects(shapes: Sequence[Any], size: Size) -> tuple[list[named.AnnotatedObject], Counter[str]]:
    """The objects, and the shapes without a box by kind. Raises `ValueError` in words."""
    objects, skipped = dict[object, named.AnnotatedObject](), Counter[str]()
    for number, shape in enumerate(shapes, start=1):
        box, kind, outline = _box(shape, number, size)
        if box is None:
            skipped[kind] += 1
            continue
        name, group = str(shape["label"]).strip(), shape.get("group_id")
        key = number if group is None else (name, str(group))  # parts of one object
        if (before := objects.get(key)) is not None:
            if outline or before.outline:
                first = before.outline or named.boxed(before.box)
                second = outline or named.boxed(box)
                outline = united(first, second, size)
            box = _around_both(before.box, box)
        objects[key] = named.AnnotatedObject(name, box, number, outline=outline)
    return list(objects.values()), skipped


def _box(shape: Any, number: int, size: Size) -> tuple[named.Box | None, str, named.Outline]:
    """The box around a shape, None where its kind has none; the kind;
    and its outline, where it is no box. Raises `ValueError` in words."""
    if not isinstance(shape, dict) or not str(shape.get("label") or "").strip():
        raise ValueError(f"shape {number} has no label")
    kind = str(shape.get("shape_type") or "polygon")
    try:
        points = [(float(p[0]), float(p[1])) for p in shape["points"]]
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"shape {number} has no points") from None
    if kind == "circle" and len(points) == 2:
        radius = math.dist(*points)
        return (
            named.around_ellipse(*points[0], radius, radius),
            kind,
            [named.ellipse(*points[0], radius, radius)],
        )
    if kind == "mask" and shape.get("mask") and len(points) == 2 and min(size) > 0:
        return _of_mask(shape["mask"], named.around(points), number, size)
    if kind in FEWEST_POINTS and len(points) >= FEWEST_POINTS[kind]:
        drawn = kind in ("polygon", "oriented_rectangle")
        return (
            named.around(points),
            kind,
            [[value for point in points for value in point]] if drawn else (),
        )
    return None, kind, ()


def _of_mask(
    data: Any, box: named.Box, number: int, size: Size
) -> tuple[named.Box, str, named.Outline]:
    """As `_box`, of a shape with the picture `data` of its mask,
    a PNG in base64, at the upper left corner of `box`.
    """
    try:
        part = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) > 0
        left, top = int(box[0]), int(box[1])
        whole = np.zeros(size, dtype=np.bool_)
        place = whole[
            max(top, 0) : max(top + part.shape[0], 0), max(left, 0) : max(left + part.shape[1], 0)
        ]
        place[:] = part[max(-top, 0) :, max(-left, 0) :][: place.shape[0], : place.shape[1]]
    except (TypeError, ValueError, OverflowError, OSError):
        raise ValueError(f"shape {number} has a `mask` that is no picture in base64") from None
    rows, columns = np.flatnonzero(whole.any(axis=1)), np.flatnonzero(whole.any(axis=0))
    if len(rows):
        box = named.around([(columns[0], rows[0]), (columns[-1] + 1, rows[-1] + 1)])
    return box, "mask", run_lengths_of(whole)


def _around_both(one: named.Box, other: named.Box) -> named.Box:
    return named.around(
        [corner for x, y, w, h in (one, other) for corner in ((x, y), (x + w, y + h))]
    )


def _pixels(value: Any) -> int:
    """A height or width of the file; 0 where it is none."""
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else 0
