"""Pascal VOC's layout: an XML file for each image, and lists in `ImageSets/Main` that say which split it is in.

VOC counts pixels from 1 and both corners belong to the box: `x = xmin - 1`, `w = xmax - xmin + 1`. A set of which any
corner is below 1 was written by a tool that counts from 0: there the corners are taken as edges, `w = xmax - xmin`.

Class names in alphabetical order get the ids 1, 2, ...; names that only other splits have follow those of training.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np

from detrellis.data.files import is_image, list_images, map_threads, read_sizes, read_text
from detrellis.data.findings import Finding, finding
from detrellis.data.records import RawDataset, from_columns
from detrellis.data.splits import SPLITS, SplitFiles
from detrellis.errors import UserError

XML_FOLDERS = ("Annotations", "annotations", "voc_annotations", "xml", "xmls", "labels", ".")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", ".")
HELD_OUT = 5  # one image in so many is held out for validation where no list says which

Corners = tuple[float, float, float, float]


class Record(NamedTuple):
    """One XML file."""

    file: Path
    image: str  # `filename`
    size: tuple[int, int]  # height, width; 0 where missing
    objects: list[tuple[str, Corners]]  # (class name, xmin, ymin, xmax, ymax)
    difficult: list[bool]  # of each object


# Finding


def find_voc(data: Path) -> dict[str, SplitFiles] | None:
    """The splits of a VOC folder, of VOCdevkit with one year in it, or of folders of XML; None where there are none."""
    devkit = data / "VOCdevkit" if (data / "VOCdevkit").is_dir() else data
    years = sorted(p for p in devkit.glob("VOC20*") if (p / "Annotations").is_dir())
    if len(years) > 1:
        raise UserError(f"{data}: more than one year: {', '.join(p.name for p in years)}", "Give one of them.")
    data = years[0] if years else data
    if by_folder := _by_folder(data):
        return by_folder
    folders = voc_folders(data)
    if folders is None:
        return None
    annotations, images = folders
    return _by_lists(data, annotations, images) or {
        part: SplitFiles(annotations, (images,), part=part) for part in ("train", "val")
    }


def voc_folders(data: Path, images: Path | None = None) -> tuple[Path, Path] | None:
    """(folder of XML, folder of images) below `data`, or with `data` as the folder of XML itself."""
    annotations = next((data / name for name in XML_FOLDERS if _first_xml(data / name)), None)
    if annotations is None:
        return None
    parents = dict.fromkeys((data, annotations.parent))
    places = [parent / name for parent in parents for name in IMAGE_FOLDERS]
    found = images or next((p for p in [annotations, *places] if p.is_dir() and _has_images(p)), None)
    if found is None:
        listed = "".join(f"\n    {place}" for place in places)
        raise UserError(f"{annotations}: XML files, but no images in{listed}", "Name the folder with `--train-images`.")
    return annotations.resolve(), found.resolve()


def _first_xml(folder: Path) -> bool:
    """Whether it is a folder of VOC's files: other tools write XML too."""
    first = next(iter(sorted(folder.glob("*.xml"))), None) if folder.is_dir() else None
    return first is not None and "<annotation" in first.read_text(errors="replace")[:500]


def _has_images(folder: Path) -> bool:
    return any(is_image(f) for f in folder.iterdir())


def _by_folder(data: Path) -> dict[str, SplitFiles] | None:
    """`train/`, `valid/`, each with its XML and images."""
    found = {}
    for split, names in SPLITS.items():
        folders = next((f for name in names if (f := voc_folders(data / name)) is not None), None)
        if folders is not None:
            found[split] = SplitFiles(folders[0], (folders[1],))
    return found if "train" in found else None


def _by_lists(data: Path, annotations: Path, images: Path) -> dict[str, SplitFiles] | None:
    lists = {f.stem: f.resolve() for f in sorted((data / "ImageSets" / "Main").glob("*.txt"))}
    # trainval trains where there is no train, and then test is what is left to validate on.
    train = lists.get("train", lists.get("trainval"))
    held_out = lists.get("val") if "train" in lists else lists.get("test")
    found = {"train": train, "val": held_out, "test": lists.get("test") if held_out != lists.get("test") else None}
    splits = {name: SplitFiles(annotations, (images,), listing=f) for name, f in found.items() if f is not None}
    return splits if "train" in splits else None


# Reading


def read_voc(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits. Training is always read: it says which name has which id, and where pixels count from."""
    records = {split: _records(splits[split]) for split in dict.fromkeys(["train", *wanted]) if split in splits}
    names = {split: sorted({name for r in rows for name, _ in r.objects}) for split, rows in records.items()}
    known = {split: list(dict.fromkeys([*names.get("train", ()), *names[split]])) for split in wanted}
    train = records.get("train") or [r for rows in records.values() for r in rows]
    first = 0 if any(min(corners[:2]) < 1 for r in train for _, corners in r.objects) else 1
    return {split: _dataset(split, splits[split], records[split], known[split], first) for split in wanted}


def _records(files: SplitFiles) -> list[Record]:
    return map_threads(_parse, _xml_files(files))


def _xml_files(files: SplitFiles) -> list[Path]:
    everything = sorted(files.annotations.glob("*.xml"))
    if files.listing is not None:
        # "2008_000001", in some sets with a 1 or -1 behind it.
        names = [line.split()[0] for line in read_text(files.listing).splitlines() if line.strip()]
        return [files.annotations / f"{name}.xml" for name in names]
    if files.part is None:
        return everything
    held_out = {f for f in everything if _hash(f) % HELD_OUT == 0} or set(sorted(everything, key=_hash)[:1])
    return [f for f in everything if (f in held_out) == (files.part == "val")]


def _hash(file: Path) -> int:
    """Of the name, so that an image stays in its split when others are added."""
    return int.from_bytes(hashlib.blake2b(file.stem.encode(), digest_size=8).digest(), "little")


def _parse(file: Path) -> Record:
    try:
        root = ElementTree.parse(file).getroot()
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file, but its split lists it", "Add it, or remove it there.") from error
    except (ElementTree.ParseError, OSError) as error:
        raise UserError(f"{file}: malformed XML ({error})", "Export the file again, or remove it.") from error
    objects, difficult = [], []
    for number, item in enumerate(root.findall("object"), start=1):
        name = (item.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{file}: object {number} has no <name>", "Name its class, or remove the object.")
        objects.append((name, _corners(item)))
        difficult.append((item.findtext("difficult") or "0").strip() == "1")
    size = (_whole(root.findtext("size/height")), _whole(root.findtext("size/width")))
    return Record(file, (root.findtext("filename") or "").strip(), size, objects, difficult)


def _corners(item: ElementTree.Element) -> Corners:
    """NaN where a number is missing, which the doctor will name."""
    xmin, ymin, xmax, ymax = (_number(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    return xmin, ymin, xmax, ymax


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _whole(text: str | None) -> int:
    value = _number(text)
    return int(value) if np.isfinite(value) else 0


def _dataset(split: str, files: SplitFiles, records: Sequence[Record], names: Sequence[str], first: int) -> RawDataset:
    folder = files.images[0]
    images = _image_names(records, folder)
    ids = {name: i for i, name in enumerate(names, start=1)}
    head = {
        "split": split,
        "source": files.annotations,
        "root": folder,
        "categories": tuple((i, name) for name, i in ids.items()),
        "label_files": tuple(str(r.file) for r in records),
        "findings": _notes(split, files, records),
        "difficult": np.array([mark for r in records for mark in r.difficult], dtype=np.bool_),
    }
    sizes = [(image, *r.size) for image, r in zip(images, records, strict=True)]
    raw = from_columns(head, sizes, _rows(records, ids, first))
    missing = np.flatnonzero((raw.sizes <= 0).any(axis=1))
    raw.sizes[missing] = read_sizes([raw.path(row) for row in missing.tolist()])
    if len(missing):
        what = f"{len(missing)} of {len(raw)} XML files lack <size>"
        note = finding("size-missing", split, files.annotations, what, count=len(missing))
        raw = replace(raw, findings=(*raw.findings, note))
    return raw


def _rows(
    records: Sequence[Record], ids: Mapping[str, int], first: int
) -> Iterator[tuple[int, int, int, tuple[float, ...]]]:
    for row, record in enumerate(records):
        for number, (name, (left, top, right, bottom)) in enumerate(record.objects, start=1):
            x, y = left - first, top - first
            yield row, number, ids[name], (x, y, right - x, bottom - y)


def _image_names(records: Sequence[Record], folder: Path) -> list[str]:
    """Image files relative to `folder`: the one named like the XML file, else what `filename` says.

    In this order, because `filename` is what goes stale when files are renamed.
    """
    paths = [p.relative_to(folder) for p in list_images(folder)]
    there = {p.as_posix() for p in paths}
    by_stem = {p.stem: p.as_posix() for p in sorted(paths, key=lambda p: -len(p.parts))}  # the least deep one wins
    names = []
    for record in records:
        written = PureWindowsPath(record.image).name  # some tools write the whole path of the machine they ran on
        own = by_stem.get(record.file.stem, by_stem.get(Path(written).stem) if written not in there else written)
        names.append(own or written or f"{record.file.stem}.jpg")
    return names


def _notes(split: str, files: SplitFiles, records: Sequence[Record]) -> tuple[Finding, ...]:
    found = []
    if files.part is not None and split == "train":
        what = f"no ImageSets/Main: a fixed {HELD_OUT - 1} in {HELD_OUT} images train, the others validate"
        found.append(finding("layout", split, files.annotations, what))
    if difficult := sum(sum(r.difficult) for r in records):
        what = f"{difficult} objects are marked difficult"
        found.append(finding("difficult-objects", split, files.annotations, what, count=difficult))
    return tuple(found)
