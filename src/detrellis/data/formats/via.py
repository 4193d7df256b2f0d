"""VGG Image Annotator (1 and 2): one JSON file, a project or exported annotations, with the regions
of each picture; or the same exported as CSV, a line a region.

Rectangles, polygons, circles and ellipses give the box around them; points and lines have none and
are counted. The class is the regions' attribute; of several the one called class, label, category,
name or type.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detrellis.data.files import read_head, read_json, read_text
from detrellis.data.formats import named_classes as named
from detrellis.data.formats.lookup import fold, renaming_notes
from detrellis.data.formats.pictures import OneFileFormat, PictureName, pictures_of
from detrellis.data.records import RawDataset
from detrellis.data.splits import SplitFiles, fixed_parts_note, select_part
from detrellis.errors import UserError

# Attributes that are taken where there are several
CLASS = ("class", "label", "category", "name", "type")
# Columns of the CSV, each cell an object of JSON
SHAPE, CLASSES = "region_shape_attributes", "region_attributes"
MARKS = ('"_via_', '"filename"', SHAPE)  # one of which stands in each such file
ONE_CLASS = "object"  # where regions have no attribute at all


class ViaImage(NamedTuple):
    """One picture of a VIA file."""

    image: str  # its name as the file has it
    regions: list[Any]


# Finding


def is_via(file: Path) -> bool:
    """Whether it is one of VIA's files."""
    try:
        head = read_head(file)
        return any(mark in head for mark in MARKS) and _images(file) is not None
    except UserError:
        return False


def _image_names(file: Path) -> list[str]:
    return [image.image for image in _read(file) if image.image]


VIA = OneFileFormat((".json", ".csv"), "files of VIA", is_via, _image_names)


# Reading


def read_via(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits. Training is always read: it says which name has which id."""
    images = {}
    for split in named.with_training(splits, wanted):
        files = splits[split]
        images[split] = select_part(
            _read(files.annotations), lambda image: Path(image.image).stem, files.part
        )
    source = next(iter(splits.values())).annotations
    attribute = _class_attribute(source, [image for read in images.values() for image in read])
    annotations = {
        split: _of_split(split, splits[split], read, attribute) for split, read in images.items()
    }
    return named.datasets(splits, wanted, annotations)


def _images(file: Path) -> list[ViaImage] | None:
    """The pictures in a file; None where it is none of VIA's.
    Raises `UserError` where it cannot be read.
    """
    if file.suffix.lower() == ".csv":
        return _images_of_csv(file)
    content = read_json(file)
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)
    entries = list(content.values()) if isinstance(content, dict) else []
    fitting = all(
        isinstance(entry, dict) and {"filename", "regions"} <= entry.keys() for entry in entries
    )
    if not entries or not fitting:
        return None
    return [ViaImage(str(entry["filename"]), _regions(entry["regions"])) for entry in entries]


def _regions(value: Any) -> list[Any]:
    """The regions of a picture: VIA 2 has a list, VIA 1 numbers to regions."""
    regions = list(value.values()) if isinstance(value, dict) else value
    return regions if isinstance(regions, list) else [regions]


def _images_of_csv(file: Path) -> list[ViaImage] | None:
    """The same of a CSV file, where each line is a region, or a picture without any."""
    lines = csv.DictReader(io.StringIO(read_text(file), newline=""))
    regions: dict[str, list[Any]] = {}
    try:
        columns = lines.fieldnames or ()
        image = next((name for name in columns if name.lstrip("#") == "filename"), None)
        if image is None or not {SHAPE, CLASSES} <= set(columns):
            return None
        for line in lines:
            of_image = regions.setdefault(line[image], [])
            if line[SHAPE] not in ("", "{}", None):
                of_image.append(
                    {
                        "shape_attributes": _cell(line[SHAPE]),
                        "region_attributes": _cell(line[CLASSES]),
                    }
                )
    except csv.Error:
        return None
    return [ViaImage(name, of_image) for name, of_image in regions.items()] or None


def _cell(text: str | None) -> Any:
    """The JSON in a cell; None where it is none."""
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return None


def _read(file: Path) -> list[ViaImage]:
    images = _images(file)
    if images is None:
        raise UserError(
            f"{file}: not a project or annotations of VIA", "Export the annotations again."
        )
    return images


def _class_attribute(source: Path, images: Iterable[ViaImage]) -> str | None:
    """The attribute that holds the class; None where there is none.
    Raises `UserError` where it could be several.
    """
    values: dict[str, Counter[str]] = {}
    for region in (region for image in images for region in image.regions):
        for key in _attributes(region):
            if name := _value(region, key):
                values.setdefault(key, Counter())[name] += 1
    if len(values) < 2:
        return next(iter(values), None)
    known = [key for key in values if fold(key) in CLASS]
    if len(known) == 1:
        return known[0]
    several = "".join(f"\n    {key}: {', '.join(list(names)[:6])}" for key, names in values.items())
    raise UserError(
        f"{source}: regions have several attributes, and any could be the class:{several}",
        "Call the one that holds the class `class`, or delete the others.",
    )


def _attributes(region: Any) -> dict[str, Any]:
    attributes = region.get("region_attributes") if isinstance(region, dict) else None
    return attributes if isinstance(attributes, dict) else {}


def _value(region: Any, key: str) -> str:
    """The class that an attribute names: a text, or the one box that is ticked."""
    value = _attributes(region).get(key)
    if isinstance(value, dict):
        ticked = [name for name, on in value.items() if on]
        return ticked[0] if len(ticked) == 1 else ""
    return "" if value is None else str(value).strip()


def _of_split(
    split: str, files: SplitFiles, images: Sequence[ViaImage], attribute: str | None
) -> named.SplitAnnotations:
    pictures = pictures_of([PictureName("", image.image) for image in images], files.images[0])
    skipped = Counter[str]()
    annotated = []
    for name, image in zip(pictures.names, images, strict=True):
        objects, problem = list[named.AnnotatedObject](), ""
        try:
            objects = _objects(image, attribute, skipped)
        except ValueError as error:
            problem = str(error)
        annotated.append(named.AnnotatedImage(files.annotations, name, (0, 0), objects, problem))
    notes = [
        *renaming_notes(split, files.annotations, pictures),
        *named.skipped_shapes(split, files.annotations, skipped),
        *fixed_parts_note(split, files, "one file of VIA"),
    ]
    return named.SplitAnnotations(annotated, notes)


def _objects(
    image: ViaImage, attribute: str | None, skipped: Counter[str]
) -> list[named.AnnotatedObject]:
    """The objects of a picture; shapes without a box are counted in `skipped`.
    Raises `ValueError` in words.
    """
    objects = []
    for number, region in enumerate(image.regions, start=1):
        name = ONE_CLASS if attribute is None else _value(region, attribute)
        shape: Any = region.get("shape_attributes") if isinstance(region, dict) else None
        try:
            kind = str(shape["name"])
            box, outline = _box(kind, shape)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"region {number} has no shape") from None
        if box is None:
            skipped[kind] += 1
        elif not name:
            raise ValueError(f"region {number} has no `{attribute}`, or several")
        else:
            objects.append(named.AnnotatedObject(name, box, number, outline=outline))
    return objects


def _box(kind: str, shape: Any) -> tuple[named.Box | None, named.Polygons]:
    """The box around a region, None where its kind has none;
    and its outline, where it is no box.
    """
    if kind == "rect":
        x, y, width, height = (float(shape[key]) for key in ("x", "y", "width", "height"))
        return (x, y, width, height), ()
    if kind == "polygon":
        points = list(zip(shape["all_points_x"], shape["all_points_y"], strict=True))
        return named.around(points), [[float(value) for point in points for value in point]]
    if kind in ("circle", "ellipse"):
        radii = ("r", "r") if kind == "circle" else ("rx", "ry")
        cx, cy, rx, ry = (float(shape[key]) for key in ("cx", "cy", *radii))
        theta = 0.0 if kind == "circle" else float(shape.get("theta") or 0)
        return named.around_ellipse(cx, cy, rx, ry, theta), [named.ellipse(cx, cy, rx, ry, theta)]
    return None, ()
