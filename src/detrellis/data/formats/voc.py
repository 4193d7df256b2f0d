"""Pascal VOC's layout: an XML file for each image, and lists in `ImageSets/Main` that say which split it is in.

VOC counts pixels from 1 and both corners belong to the box: `x = xmin - 1`, `w = xmax - xmin + 1`. A set of which any
corner is below 1 was written by a tool that counts from 0, and corners with decimals by one that means edges: there
`x = xmin`, `w = xmax - xmin`. VOC itself has a few decimals, so that more than one object in a hundred must have them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.files import files_in, is_image, list_images, map_threads, read_text, subfolders, walk
from detrellis.data.formats.lookup import SPLIT_WORDS, child, fold, renaming_notes
from detrellis.data.formats.named_classes import Box, Record, Thing, class_names, dataset
from detrellis.data.formats.pictures import Wanted, image_folder, pictures_of, spread
from detrellis.data.formats.voc_xml import Item, Parsed, is_voc, parse_xml
from detrellis.data.records import RawDataset
from detrellis.data.splits import HELD_OUT, SPLITS, SplitFiles, held_out
from detrellis.errors import UserError

# Folders that are called like XML files, in the order in which they are preferred.
XML_FOLDERS = ("annotations", "annotation", "annots", "voc_annotations", "xml", "xmls", "labels", "label")
DECIMALS = 0.01  # of VOC's own objects fewer have decimals


# Finding


def find_voc(data: Path, images: Mapping[str, Path | None] | None = None) -> dict[str, SplitFiles] | None:
    """The splits of a VOC folder, of VOCdevkit with one year in it, or of folders of XML; None where there are none.

    `images` has the image folder of each split for which it is known.
    """
    given = {split: folder for split, folder in (images or {}).items() if folder is not None}
    devkit = data / "VOCdevkit" if (data / "VOCdevkit").is_dir() else data
    years = sorted(p for p in devkit.glob("VOC20*") if (p / "Annotations").is_dir())
    if len(years) > 1:
        raise UserError(f"{data}: more than one year: {', '.join(p.name for p in years)}", "Give one of them.")
    data = years[0] if years else data
    if by_folder := _by_folder(data, [data / name for names in SPLITS.values() for name in names], given):
        return by_folder
    annotations = _xml_folder(data)
    if annotations is None:
        return None
    inside = [annotations / name for names in SPLITS.values() for name in names]
    if by_folder := _by_folder(data, inside, given):
        return by_folder
    folder = given.get("train") or _images_of(annotations, data)
    found = _by_lists([data, annotations.parent], annotations, folder) or {
        part: SplitFiles(annotations, (folder,), part=part) for part in ("train", "val")
    }
    return {split: _with_images(files, given.get(split)) for split, files in found.items()}


def _with_images(files: SplitFiles, images: Path | None) -> SplitFiles:
    folders = files.images if images is None else (images.resolve(),)
    return SplitFiles(files.annotations, folders, files.listing, files.part)


def voc_folders(data: Path, images: Path | None = None, around: Path | None = None) -> tuple[Path, Path] | None:
    """(folder of XML, folder of images) in `data`, or with `data` as the folder of XML itself.

    Images are looked for in `data`, then in `around`, then in the folders above the XML.
    """
    annotations = _xml_folder(data)
    if annotations is None:
        return None
    return annotations, images.resolve() if images is not None else _images_of(annotations, data, around)


def _xml_folder(data: Path) -> Path | None:
    """The folder below which all XML of VOC's form lies: one of a usual name, `data`, or the only one there is."""
    below = subfolders(data, 1)
    named = sorted((f for f in below if fold(f.name) in XML_FOLDERS), key=lambda f: XML_FOLDERS.index(fold(f.name)))
    found = next((folder for folder in named if _holds_xml(_xml_below(folder))), None)
    if found is None and _holds_xml(files_in(data, ".xml")):
        found = data
    if found is None:
        others = [folder for folder in below if _holds_xml(_xml_below(folder))]
        found = data if len(others) > 1 else next(iter(others), None)
    if found is None:
        return None
    # "annotations/xmls", or a whole set one folder deeper.
    deeper = None if found == data else _xml_folder(found)
    if deeper is not None and all(deeper in file.resolve().parents for file in _xml_below(found)):
        found = deeper
    return found.resolve()


def _xml_below(folder: Path) -> list[Path]:
    return sorted(Path(parent, name) for parent, names in walk(folder) for name in names if fold(name).endswith(".xml"))


def _holds_xml(files: Sequence[Path]) -> bool:
    return any(is_voc(file) for file in spread(files))


def _images_of(annotations: Path, data: Path, around: Path | None = None) -> Path:
    files = _xml_below(annotations)
    sample = spread(files)
    wanted = [Wanted(_stem(file, annotations), parse_xml(file).image) for file in sample]
    above = [p for p in (data, around, annotations, annotations.parent) if p is not None]
    return image_folder(annotations, [place.resolve() for place in above], wanted).resolve()


def _stem(file: Path, annotations: Path) -> str:
    return file.relative_to(annotations).with_suffix("").as_posix()


def _by_folder(data: Path, places: Sequence[Path], given: Mapping[str, Path]) -> dict[str, SplitFiles] | None:
    """`train/`, `valid/`, each with its XML; the images are there too, or in a folder called the same."""
    by_name = {fold(place.name): place for place in places if place.is_dir()}
    found = {}
    for split, names in SPLITS.items():
        own = [by_name[name] for name in names if name in by_name]
        folders = next((f for place in own if (f := voc_folders(place, given.get(split), data)) is not None), None)
        if folders is not None:
            found[split] = SplitFiles(folders[0], (folders[1],))
    return found if "train" in found else None


def _by_lists(places: Sequence[Path], annotations: Path, images: Path) -> dict[str, SplitFiles] | None:
    folders = [child(place, parts) for place in places for parts in (("imagesets", "main"), ("imagesets",), ())]
    lists = next((found for folder in folders if folder is not None and (found := _lists(folder))), {})
    # trainval trains where there is no train, and then test is what is left to validate on.
    train = lists.get("train", lists.get("trainval"))
    held = lists.get("val") if "train" in lists else lists.get("test")
    meant = {"train": train, "val": held, "test": lists.get("test") if held != lists.get("test") else None}
    splits = {name: SplitFiles(annotations, (images,), listing=f) for name, f in meant.items() if f is not None}
    return splits if "train" in splits else None


def _lists(folder: Path) -> dict[str, Path]:
    """Lists of images by name; {} where none is for training."""
    files = files_in(folder.resolve(), ".txt")
    lists = {SPLIT_WORDS.get(fold(f.stem), fold(f.stem)): f for f in files}
    for split in (s for s in (*SPLITS, "trainval") if s not in lists):
        if (of_class := _of_classes(files, split)) is not None:
            lists[split] = of_class
    return lists if "train" in lists or "trainval" in lists else {}


def _of_classes(files: Sequence[Path], split: str) -> Path | None:
    """One of `cat_train.txt`, `dog_train.txt`, which all list the split's images in VOC; None where there are none."""
    own = [f for f in files if fold(f.stem).endswith(f"_{split}")]
    named = {frozenset(_readings(line)[-1] for line in read_text(f).splitlines() if line.strip()) for f in own}
    if len(named) > 1:
        what = f"{own[0].parent}: lists of single classes ({own[0].name}, ...) that do not name the same images"
        raise UserError(what, f"Write {own[0].with_name(split)}.txt, one image a line.")
    return next(iter(own), None)


# Reading


def read_voc(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits. Training is always read: it says which name has which id, and where pixels count from."""
    files = {split: _xml_files(splits[split]) for split in dict.fromkeys(["train", *wanted]) if split in splits}
    parsed = {split: map_threads(parse_xml, own) for split, own in files.items()}
    train = parsed.get("train") or [p for rows in parsed.values() for p in rows]
    first = 0 if _means_edges([item for p in train for item in p.items]) else 1
    read = {split: _matched(split, splits[split], files[split], parsed[split], first) for split in files}
    names = class_names({split: records for split, (records, _) in read.items()}, wanted)
    told = set[Path]()
    found = {}
    for split in wanted:
        records, notes = read[split]
        own = splits[split]
        if own.images[0] not in told:
            told.add(own.images[0])
            of_folder = [s for s in splits if splits[s].images == own.images]
            used = {r.image for s in of_folder if s in read for r in read[s][0]}
            notes = [*notes, *_unlabelled(split, own, {splits[s].annotations for s in of_folder}, used)]
        found[split] = dataset(split, own.annotations, own.images[0], records, names[split], notes, difficult=True)
    return found


def _xml_files(files: SplitFiles) -> list[Path]:
    everything = _xml_below(files.annotations)
    if files.listing is not None:
        return _listed(files.listing, everything, files.annotations)
    if files.part is None:
        return everything
    out = held_out(file.stem for file in everything)
    return [file for file in everything if (file.stem in out) == (files.part == "val")]


def _listed(listing: Path, everything: Sequence[Path], annotations: Path) -> list[Path]:
    """The XML file that each line names; one that is not there where none does, or several."""
    count = Counter(fold(file.stem) for file in everything)
    known = {fold(file.stem): file for file in everything if count[fold(file.stem)] == 1}
    known |= {fold(_stem(file, annotations)): file for file in everything}
    found = []
    for line in read_text(listing).splitlines():
        readings = _readings(line)
        if readings:
            there = (known[fold(name)] for name in readings if fold(name) in known)
            found.append(next(there, annotations / f"{readings[-1]}.xml"))
    return list(dict.fromkeys(found))


def _readings(line: str) -> list[str]:
    """What a line may name: "my photo 1", in some sets with a 1, 0 or -1 behind it, a suffix, or folders before it."""
    whole = line.strip().replace("\\", "/")
    ways = []
    for text in (whole, re.sub(r"\s+(-1|0|1)$", "", whole)):
        bare = Path(text).with_suffix("").as_posix() if is_image(text) or fold(text).endswith(".xml") else text
        ways += [text, bare, bare.rpartition("/")[2]]
    return list(dict.fromkeys(way for way in ways if way))


def _means_edges(items: Sequence[Item]) -> bool:
    written = [item.corners for item in items if not item.edges]
    decimals = sum(any(value % 1 for value in corners if math.isfinite(value)) for corners in written)
    return decimals > DECIMALS * len(written) or any(min(corners[:2]) < 1 for corners in written)


def _matched(
    split: str, files: SplitFiles, own: Sequence[Path], parsed: Sequence[Parsed], first: int
) -> tuple[list[Record], list[Finding]]:
    """A record for each XML file whose picture is known, and findings."""
    folder = files.images[0]
    wanted = [Wanted(_stem(file, files.annotations), p.image) for file, p in zip(own, parsed, strict=True)]
    pictures = pictures_of(wanted, folder)
    records, notes = [], list(_notes(split, files, parsed))
    everything = _xml_below(files.annotations) if files.listing is not None else []
    for file, name, (_, size, items, problem) in zip(own, pictures.names, parsed, strict=True):
        things = [Thing(i.name, _box(i, first), n, i.difficult, i.written) for n, i in enumerate(items, start=1)]
        if problem and not (folder / name).is_file():
            alike = [_stem(f, files.annotations) for f in everything if fold(f.stem) == fold(file.stem) and f != file]
            what = f"{problem}; its name could mean {' or '.join(alike)}" if alike else problem
            notes.append(finding("unreadable-labels", split, file, what))
        else:
            records.append(Record(file, name, size, things, problem))
    return records, [*notes, *renaming_notes(split, files.annotations, pictures)]


def _box(item: Item, first: int) -> Box:
    left, top, right, bottom = item.corners
    if item.edges:
        return left, top, right - left, bottom - top
    x, y = left - first, top - first
    return x, y, right - x, bottom - y


def _unlabelled(split: str, files: SplitFiles, annotations: set[Path], used: set[str]) -> list[Finding]:
    """The pictures of the folder that have no XML file: what they show is unknown, so that they are left out."""
    folder = files.images[0]
    xml = {file: fold(file.stem) for place in annotations for file in _xml_below(place)}
    pictures = [p.relative_to(folder).as_posix() for p in list_images(folder)]
    used = used.intersection(pictures)  # others are names without a picture
    taken = {fold(Path(name).with_suffix("").as_posix()) for name in used}
    # Two that differ in their suffix have one file, and one of them was taken; others may be of splits not read now.
    told = set(xml.values()) - {fold(Path(name).stem) for name in used}
    bare = [
        name
        for name in pictures
        if name not in used
        and (fold(Path(name).with_suffix("").as_posix()) in taken or fold(Path(name).stem) not in told)
    ]
    if bare:
        # Files that are called otherwise may name them.
        stems = {fold(Path(name).stem) for name in pictures}
        strangers = [file for file, stem in xml.items() if stem not in stems]
        named = {fold(Path(p.image.replace("\\", "/")).name) for p in map_threads(parse_xml, strangers)}
        bare = [name for name in bare if fold(Path(name).name) not in named]
    if not bare:
        return []
    what = f"{len(bare)} of {len(pictures)} pictures have no XML file and are left out; the first: {bare[0]}"
    return [finding("unlabelled-images", split, folder, what, count=len(bare))]


def _notes(split: str, files: SplitFiles, parsed: Sequence[Parsed]) -> list[Finding]:
    found = []
    if files.part is not None and split == "train":
        what = f"no lists of train and val: a fixed {HELD_OUT - 1} in {HELD_OUT} images train, the others validate"
        found.append(finding("layout", split, files.annotations, what))
    if difficult := sum(item.difficult for p in parsed for item in p.items):
        what = f"{difficult} objects are marked difficult"
        found.append(finding("difficult-objects", split, files.annotations, what, count=difficult))
    return found
