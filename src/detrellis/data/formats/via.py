"""VGG Image Annotator (1 and 2): one JSON file, a project or exported annotations, with the regions of each picture.

Rectangles, polygons, circles and ellipses give the box around them; points and lines have none and are counted. The
class is the regions' attribute; of several the one called class, label, category, name or type.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.files import files_in, read_text, subfolders
from detrellis.data.formats.labelme import skipped_shapes
from detrellis.data.formats.lookup import fold, renaming_notes
from detrellis.data.formats.named_classes import Box, Record, Thing, class_names, dataset
from detrellis.data.formats.outlines import around, around_ellipse
from detrellis.data.formats.pictures import Wanted, files_of_splits, image_folder, pictures_of, splits_by_name, spread
from detrellis.data.records import RawDataset
from detrellis.data.splits import HELD_OUT, SplitFiles, held_out
from detrellis.errors import UserError

CLASS = ("class", "label", "category", "name", "type")  # attributes that are taken where there are several
HEAD = 65536  # bytes that are looked at to recognise a file
ONE_CLASS = "object"  # where regions have no attribute at all


class Entry(NamedTuple):
    """One picture."""

    image: str
    regions: list[Any]


# Finding


def is_via(file: Path) -> bool:
    """Whether it is one of VIA's files."""
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD).replace(b"\0", b"")  # UTF-16 has a zero in each letter
        return (b'"_via_' in head or b'"filename"' in head) and _entries(read_text(file)) is not None
    except (UserError, OSError):
        return False


def find_via(data: Path, given: Mapping[str, Path | None]) -> dict[str, SplitFiles] | None:
    """VIA's files in a folder; None where there are none. Raises `UserError` where names do not tell the splits."""
    files = [f for folder in [data, *subfolders(data, 1)] for f in files_in(folder, ".json")[:200] if is_via(f)]
    found = splits_by_name(data, files, "files of VIA")
    return None if found is None else via_splits(found.files, given, data, parts=found.parts)


def via_splits(
    files: Mapping[str, Path], given: Mapping[str, Path | None], data: Path | None = None, parts: bool = False
) -> dict[str, SplitFiles]:
    """The files with their image folders; `parts`: one file is train and val together."""
    return files_of_splits(files, given, lambda file: _images_of(file, data), parts)


def _images_of(file: Path, data: Path | None) -> Path:
    names = [Path(entry.image.replace("\\", "/")) for entry in _read(file) if entry.image]
    wanted = [Wanted(str(name.with_suffix("")), str(name)) for name in spread(names)]
    return image_folder(file, (file.parent, data or file.parent.parent), wanted)


# Reading


def read_via(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits; training is always read, for it says which name has which id."""
    entries = {split: _own(splits[split]) for split in dict.fromkeys(["train", *wanted]) if split in splits}
    source = next(iter(splits.values())).annotations
    attribute = _attribute(source, [entry for own in entries.values() for entry in own])
    read = {split: _records(split, splits[split], own, attribute) for split, own in entries.items()}
    names = class_names({split: records for split, (records, _) in read.items()}, wanted)
    found = {}
    for split in wanted:
        records, notes = read[split]
        found[split] = dataset(split, splits[split].annotations, splits[split].images[0], records, names[split], notes)
    return found


def _entries(text: str) -> list[Any] | None:
    """The records of the pictures; None where the text is none of VIA's."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)
    found = list(content.values()) if isinstance(content, dict) else None
    return found if found and all(isinstance(e, dict) and {"filename", "regions"} <= e.keys() for e in found) else None


def _read(file: Path) -> list[Entry]:
    found = _entries(read_text(file))
    if found is None:
        raise UserError(f"{file}: not a project or annotations of VIA", "Export the annotations as JSON again.")
    entries = []
    for row in found:
        regions = row["regions"]
        entries.append(Entry(str(row["filename"]), list(regions.values() if isinstance(regions, dict) else regions)))
    return entries


def _own(files: SplitFiles) -> list[Entry]:
    entries = _read(files.annotations)
    if files.part is None:
        return entries
    out = held_out(Path(entry.image).stem for entry in entries)
    return [entry for entry in entries if (Path(entry.image).stem in out) == (files.part == "val")]


def _attribute(source: Path, entries: Iterable[Entry]) -> str | None:
    """The attribute that holds the class; None where there is none. Raises `UserError` where it could be several."""
    values: dict[str, Counter[str]] = {}
    for region in (region for entry in entries for region in entry.regions):
        for key in _attributes(region):
            if name := _value(region, key):
                values.setdefault(key, Counter())[name] += 1
    if len(values) < 2:
        return next(iter(values), None)
    known = [key for key in values if fold(key) in CLASS]
    if len(known) == 1:
        return known[0]
    listed = "".join(f"\n    {key}: {', '.join(list(names)[:6])}" for key, names in values.items())
    raise UserError(
        f"{source}: regions have several attributes, and any could be the class:{listed}",
        "Call the one that holds the class `class`, or delete the others.",
    )


def _attributes(region: Any) -> dict[str, Any]:
    found = region.get("region_attributes") if isinstance(region, dict) else None
    return found if isinstance(found, dict) else {}


def _value(region: Any, key: str) -> str:
    """The class that an attribute names: a text, or the one box that is ticked."""
    value = _attributes(region).get(key)
    if isinstance(value, dict):
        ticked = [name for name, on in value.items() if on]
        return ticked[0] if len(ticked) == 1 else ""
    return "" if value is None else str(value).strip()


def _records(
    split: str, files: SplitFiles, entries: Sequence[Entry], attribute: str | None
) -> tuple[list[Record], list[Finding]]:
    folder = files.images[0]
    pictures = pictures_of([Wanted("", entry.image) for entry in entries], folder)
    skipped = Counter[str]()
    records = []
    for name, entry in zip(pictures.names, entries, strict=True):
        try:
            records.append(Record(files.annotations, name, (0, 0), _things(entry, attribute, skipped)))
        except ValueError as error:
            records.append(Record(files.annotations, name, (0, 0), [], str(error)))
    notes = [*renaming_notes(split, files.annotations, pictures), *skipped_shapes(split, files.annotations, skipped)]
    if split == "train" and files.part is not None:
        what = f"one file of VIA: a fixed {HELD_OUT - 1} in {HELD_OUT} images train, the others validate"
        notes.append(finding("layout", split, files.annotations, what))
    return records, notes


def _things(entry: Entry, attribute: str | None, skipped: Counter[str]) -> list[Thing]:
    """The objects of a picture. Raises `ValueError` in words."""
    things = []
    for number, region in enumerate(entry.regions, start=1):
        name = ONE_CLASS if attribute is None else _value(region, attribute)
        shape = region.get("shape_attributes") if isinstance(region, dict) else None
        try:
            kind = str(shape["name"])  # type: ignore[index]
            box = _box(kind, shape)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"region {number} has no shape") from None
        if box is None:
            skipped[kind] += 1
        elif not name:
            raise ValueError(f"region {number} has no `{attribute}`, or several")
        else:
            things.append(Thing(name, box, number))
    return things


def _box(kind: str, shape: Any) -> Box | None:
    """The box around a region; None where its kind has none."""
    if kind == "rect":
        x, y, width, height = (float(shape[key]) for key in ("x", "y", "width", "height"))
        return x, y, width, height
    if kind == "polygon":
        return around(list(zip(shape["all_points_x"], shape["all_points_y"], strict=True)))
    if kind == "circle":
        return around_ellipse(float(shape["cx"]), float(shape["cy"]), float(shape["r"]), float(shape["r"]))
    if kind == "ellipse":
        centre = float(shape["cx"]), float(shape["cy"])
        return around_ellipse(*centre, float(shape["rx"]), float(shape["ry"]), float(shape.get("theta") or 0))
    return None
