"""Pascal VOC's layout: an XML file for each image,
and lists in `ImageSets/Main` that say which split it is in.

VOC counts pixels from 1 and both corners belong to the box: `x = xmin - 1`, `w = xmax - xmin + 1`.
A set of which any corner is below 1 was written by a tool that counts from 0, and corners with
decimals by one that means edges: there `x = xmin`, `w = xmax - xmin`. VOC itself has a few
decimals, so that more than one object in a hundred must have them.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from detrellis.data.files import (
    files_below,
    files_in,
    is_image,
    list_images,
    map_threads,
    read_text,
    stem_below,
    subfolders,
)
from detrellis.data.findings import Finding, finding
from detrellis.data.formats import named_classes as named
from detrellis.data.formats.lookup import SPLIT_WORDS, child, fold
from detrellis.data.formats.pictures import GivenImages, PictureName, image_folder, spread
from detrellis.data.formats.voc_xml import VocFile, VocObject, is_voc, parse_xml
from detrellis.data.records import RawDataset
from detrellis.data.splits import (
    SPLITS,
    SplitFiles,
    both_parts,
    deciding_splits,
    fixed_parts_note,
    select_part,
)
from detrellis.errors import UserError

# Folders that are called like XML files, in the order in which they are preferred.
XML_FOLDERS = (
    "annotations",
    "annotation",
    "annots",
    "voc_annotations",
    "xml",
    "xmls",
    "labels",
    "label",
)
DECIMALS = 0.01  # of VOC's own objects fewer have decimals


# Finding


def find_voc(data: Path, images: GivenImages | None = None) -> dict[str, SplitFiles] | None:
    """The splits of a VOC folder, of VOCdevkit with one year in it, or of folders of XML;
    None where there are none.

    `images` has the image folder of each split for which it is known.
    """
    given = {split: folder for split, folder in (images or {}).items() if folder is not None}
    data = _year_folder(data)
    folders_of_splits = [data / name for names in SPLITS.values() for name in names]
    if splits := _by_folder(data, folders_of_splits, given):
        return splits
    annotations = _xml_folder(data)
    if annotations is None:
        return None
    folders_of_splits = [annotations / name for names in SPLITS.values() for name in names]
    if splits := _by_folder(data, folders_of_splits, given):
        return splits
    folder = given.get("train") or _images_of(annotations, data)
    splits = _by_lists([data, annotations.parent], annotations, folder)
    if splits is None:
        splits = both_parts(SplitFiles(annotations, (folder,)))
    return {
        split: replace(files, images=(given[split].resolve(),)) if split in given else files
        for split, files in splits.items()
    }


def _year_folder(data: Path) -> Path:
    """The one year in VOCdevkit, or in the folder itself; the folder where there is no year."""
    devkit = data / "VOCdevkit" if (data / "VOCdevkit").is_dir() else data
    years = sorted(p for p in devkit.glob("VOC20*") if (p / "Annotations").is_dir())
    if len(years) > 1:
        raise UserError(
            f"{data}: more than one year: {', '.join(p.name for p in years)}", "Give one of them."
        )
    return years[0] if years else data


def voc_folders(
    data: Path, images: Path | None = None, around: Path | None = None
) -> tuple[Path, Path] | None:
    """(folder of XML, folder of images) in `data`, or with `data` as the folder of XML itself.

    Images are looked for in `data`, then in `around`, then in the folders above the XML.
    """
    annotations = _xml_folder(data)
    if annotations is None:
        return None
    return annotations, images.resolve() if images is not None else _images_of(
        annotations, data, around
    )


def _xml_folder(data: Path) -> Path | None:
    """The folder below which all XML of VOC's form lies:
    one of a usual name, `data`, or the only one there is.
    """
    below = subfolders(data, 1)
    usual = [folder for folder in below if fold(folder.name) in XML_FOLDERS]
    usual.sort(key=lambda folder: XML_FOLDERS.index(fold(folder.name)))
    annotations = next((folder for folder in usual if _holds_xml(_xml_below(folder))), None)
    if annotations is None and _holds_xml(files_in(data, ".xml")):
        annotations = data
    if annotations is None:
        others = [folder for folder in below if _holds_xml(_xml_below(folder))]
        annotations = data if len(others) > 1 else next(iter(others), None)
    if annotations is None:
        return None
    # "annotations/xmls", or a whole set one folder deeper.
    deeper = None if annotations == data else _xml_folder(annotations)
    if deeper is not None and all(
        deeper in real.parents for real in map(_real, _xml_below(annotations))
    ):
        annotations = deeper
    return annotations.resolve()


def _real(file: Path) -> Path:
    """The file behind links; of links in a circle the path itself."""
    return Path(os.path.realpath(file))


def _xml_below(folder: Path) -> list[Path]:
    return files_below(folder, ".xml")


def _holds_xml(files: Sequence[Path]) -> bool:
    return any(is_voc(file) for file in spread(files))


def _images_of(annotations: Path, data: Path, around: Path | None = None) -> Path:
    sample = spread(_xml_below(annotations))
    pictures = [
        PictureName(stem_below(annotations, file), parse_xml(file).image) for file in sample
    ]
    places = [
        place for place in (data, around, annotations, annotations.parent) if place is not None
    ]
    return image_folder(annotations, [place.resolve() for place in places], pictures).resolve()


def _by_folder(
    data: Path, places: Sequence[Path], given: Mapping[str, Path]
) -> dict[str, SplitFiles] | None:
    """`train/`, `valid/`, each with its XML;
    the images are there too, or in a folder called the same.
    """
    by_name = {fold(place.name): place for place in places if place.is_dir()}
    splits = {}
    for split, names in SPLITS.items():
        for place in (by_name[name] for name in names if name in by_name):
            folders = voc_folders(place, given.get(split), data)
            if folders is not None:
                annotations, images = folders
                splits[split] = SplitFiles(annotations, (images,))
                break
    return splits if "train" in splits else None


def _by_lists(
    places: Sequence[Path], annotations: Path, images: Path
) -> dict[str, SplitFiles] | None:
    """The splits that lists of images tell, in the usual folder for them;
    None where no list is for training.
    """
    folders = [
        child(place, parts)
        for place in places
        for parts in (("imagesets", "main"), ("imagesets",), ())
    ]
    candidates = (_lists(folder) for folder in folders if folder is not None)
    lists = next(filter(None, candidates), {})
    # trainval trains where there is no train, and then test is what is left to validate on.
    train = lists.get("train", lists.get("trainval"))
    val = lists.get("val") if "train" in lists else lists.get("test")
    test = lists.get("test") if val != lists.get("test") else None
    by_split = {"train": train, "val": val, "test": test}
    splits = {
        split: SplitFiles(annotations, (images,), listing=file)
        for split, file in by_split.items()
        if file is not None
    }
    return splits if "train" in splits else None


def _lists(folder: Path) -> dict[str, Path]:
    """Lists of images by name; {} where none is for training."""
    files = files_in(folder.resolve(), ".txt")
    lists = {SPLIT_WORDS.get(fold(file.stem), fold(file.stem)): file for file in files}
    for split in (*SPLITS, "trainval"):
        if split not in lists and (of_class := _list_of_a_class(files, split)) is not None:
            lists[split] = of_class
    return lists if "train" in lists or "trainval" in lists else {}


def _list_of_a_class(files: Sequence[Path], split: str) -> Path | None:
    """One of `cat_train.txt`, `dog_train.txt`, which all list the split's images in VOC;
    None where there are none.
    """
    lists = [file for file in files if fold(file.stem).endswith(f"_{split}")]
    contents = set()
    for file in lists:
        lines = read_text(file).splitlines()
        contents.add(frozenset(_readings(line)[-1] for line in lines if line.strip()))
    if len(contents) > 1:
        what = (
            f"{lists[0].parent}: lists of single classes ({lists[0].name}, ...) that do not name "
            "the same images"
        )
        raise UserError(what, f"Write {lists[0].with_name(split)}.txt, one image a line.")
    return next(iter(lists), None)


# Reading


def read_voc(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits. Training is always read:
    it says which name has which id, and where pixels count from.
    """
    files = {split: _xml_files(splits[split]) for split in named.with_training(splits, wanted)}
    parsed = {split: map_threads(parse_xml, xml) for split, xml in files.items()}
    deciding = [content for split in deciding_splits(splits) for content in parsed.get(split, ())]
    deciding = deciding or [content for contents in parsed.values() for content in contents]
    first_pixel = (
        0 if _corners_are_edges([o for content in deciding for o in content.objects]) else 1
    )
    annotations = {
        split: _of_split(split, splits[split], files[split], parsed[split], first_pixel)
        for split in files
    }
    # Once for each folder of pictures: those that no XML file is about.
    looked_at = set[Path]()
    for split in wanted:
        folder = splits[split].images[0]
        if folder not in looked_at:
            looked_at.add(folder)
            of_folder = [name for name in splits if splits[name].images == splits[split].images]
            read = [annotations[name] for name in of_folder if name in annotations]
            used = {image.image for split_annotations in read for image in split_annotations.images}
            xml_folders = {splits[name].annotations for name in of_folder}
            unlabelled = _unlabelled(split, folder, xml_folders, used)
            annotations[split] = annotations[split].with_findings(unlabelled)
    return named.datasets(splits, wanted, annotations, difficult=True)


def _xml_files(files: SplitFiles) -> list[Path]:
    everything = _xml_below(files.annotations)
    if files.listing is not None:
        everything = _listed(files.listing, everything, files.annotations)
    return select_part(everything, lambda file: file.stem, files.part)


def _listed(listing: Path, everything: Sequence[Path], annotations: Path) -> list[Path]:
    """The XML file that each line names; one that is not there where none does, or several."""
    count = Counter(fold(file.stem) for file in everything)
    known = {fold(file.stem): file for file in everything if count[fold(file.stem)] == 1}
    known |= {fold(stem_below(annotations, file)): file for file in everything}
    files = []
    for line in read_text(listing).splitlines():
        names = _readings(line)
        if names:
            existing = (known[fold(name)] for name in names if fold(name) in known)
            files.append(next(existing, annotations / f"{names[-1]}.xml"))
    return list(dict.fromkeys(files))


def _readings(line: str) -> list[str]:
    """What a line may name: "my photo 1", in some sets with a 1,
    0 or -1 behind it, a suffix, or folders before it.
    """
    whole = line.strip().replace("\\", "/")
    ways = []
    for text in (whole, re.sub(r"\s+(-1|0|1)$", "", whole)):
        bare = (
            Path(text).with_suffix("").as_posix()
            if is_image(text) or fold(text).endswith(".xml")
            else text
        )
        ways += [text, bare, bare.rpartition("/")[2]]
    return list(dict.fromkeys(way for way in ways if way))


def _corners_are_edges(objects: Sequence[VocObject]) -> bool:
    """Whether corners are edges, counted from 0;
    else they are inclusive pixels, counted from 1 (see the top).
    """
    written = [o.corners for o in objects if not o.edges]
    with_decimals = sum(
        any(value % 1 for value in corners if math.isfinite(value)) for corners in written
    )
    return with_decimals > DECIMALS * len(written) or any(
        min(corners[:2]) < 1 for corners in written
    )


def _of_split(
    split: str,
    files: SplitFiles,
    xml_files: Sequence[Path],
    parsed: Sequence[VocFile],
    first_pixel: int,
) -> named.SplitAnnotations:
    """An image for each XML file whose picture is known, and findings."""
    everything = _xml_below(files.annotations) if files.listing is not None else []
    images = []
    for file, content in zip(xml_files, parsed, strict=True):
        objects = [
            named.AnnotatedObject(o.name, _box(o, first_pixel), number, o.difficult, o.written)
            for number, o in enumerate(content.objects, start=1)
        ]
        problem = content.problem
        if problem and (
            same_name := [f for f in everything if fold(f.stem) == fold(file.stem) and f != file]
        ):
            meant = " or ".join(stem_below(files.annotations, other) for other in same_name)
            problem = f"{problem}; its name could mean {meant}"
        images.append(named.AnnotatedImage(file, content.image, content.size, objects, problem))
    notes = fixed_parts_note(split, files, "no lists of train and val")
    if difficult := sum(o.difficult for content in parsed for o in content.objects):
        what = f"{difficult} objects are marked difficult"
        notes.append(finding("difficult-objects", split, files.annotations, what, count=difficult))
    return named.with_pictures(split, files, images).with_findings(notes)


def _box(each: VocObject, first_pixel: int) -> named.Box:
    left, top, right, bottom = each.corners
    if each.edges:
        return left, top, right - left, bottom - top
    x, y = left - first_pixel, top - first_pixel
    return x, y, right - x, bottom - y


def _unlabelled(split: str, folder: Path, xml_folders: set[Path], used: set[str]) -> list[Finding]:
    """The pictures of the folder that have no XML file:
    what they show is unknown, so that they are left out.
    """
    stems = {file: fold(file.stem) for place in xml_folders for file in _xml_below(place)}
    pictures = [p.relative_to(folder).as_posix() for p in list_images(folder)]
    used = used.intersection(pictures)  # others are names without a picture
    taken = {fold(Path(name).with_suffix("").as_posix()) for name in used}
    # XML files that may be about other pictures, of splits that are not read now.
    free = set(stems.values()) - {fold(Path(name).stem) for name in used}
    bare = []
    for path in (Path(name) for name in pictures if name not in used):
        # Two pictures that differ in their suffix have one XML file, and one of them was taken.
        twin_was_taken = fold(path.with_suffix("").as_posix()) in taken
        if twin_was_taken or fold(path.stem) not in free:
            bare.append(path.as_posix())
    if bare:
        # XML files that are called otherwise may name them.
        picture_stems = {fold(Path(name).stem) for name in pictures}
        strangers = [file for file, stem in stems.items() if stem not in picture_stems]
        parsed = map_threads(parse_xml, strangers)
        written = {fold(Path(content.image.replace("\\", "/")).name) for content in parsed}
        bare = [name for name in bare if fold(Path(name).name) not in written]
    if not bare:
        return []
    what = (
        f"{len(bare)} of {len(pictures)} pictures have no XML file and are left out; the first: "
        f"{bare[0]}"
    )
    return [finding("unlabelled-images", split, folder, what, count=len(bare))]
