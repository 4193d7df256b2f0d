"""YOLO's layout: `data.yaml` (or `classes.txt`), images, and a text file of labels for each image.

An image without a label file has no boxes. Class numbers are the category ids: 0, 1, ... What the lines of a label file
are is in `yolo_labels.py`, how the yaml is read in `yolo_yaml.py`.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.files import (
    common_root,
    files_in,
    image_suffixes,
    list_images,
    map_threads,
    read_sizes,
    read_text,
    subfolders,
)
from detrellis.data.formats.lookup import child, fold, real_names, renaming_notes
from detrellis.data.formats.yolo_labels import Labels, Meaning, meaning, read_labels, wrong_length
from detrellis.data.formats.yolo_yaml import (
    SHAPE,
    SUFFIXES,
    Keypoints,
    class_count,
    class_names,
    given,
    keypoints,
    load_yaml,
    locate,
)
from detrellis.data.records import RawDataset, from_columns
from detrellis.data.splits import SPLITS, SplitFiles
from detrellis.errors import UserError

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
CLASS_LISTS = ("classes.txt", "obj.names", "labels/classes.txt")  # at the top, or in a split's folder
IMAGES = ("images", "image", "imgs", "img", "jpegimages")  # folders that have one of labels beside them
LABELS = ("labels", "label", "annotations")
SNIFFED = 8  # files of a folder that are opened to see what they are
IN_PIXELS = 1.5  # shares above this are no drawing errors at the border


# Finding


def find_yolo(data: Path) -> dict[str, SplitFiles] | None:
    """The splits of a yaml file, or of a folder with one; None where there is neither."""
    file = data if data.suffix.lower() in SUFFIXES else _yaml_in(data)
    if file is not None:
        return _from_yaml(file)
    lists = [folder / name for folder in _folders_of_splits(data) for name in CLASS_LISTS if (folder / name).is_file()]
    if len({class_names(file) for file in lists}) > 1:
        listed = ", ".join(file.relative_to(data).as_posix() for file in lists)
        raise UserError(f"{data}: lists of classes that differ: {listed}", "Make them the same, or leave one.")
    return _from_class_list(data, lists[0]) if lists else None


def _folders_of_splits(data: Path) -> list[Path]:
    """The folder itself, then those called like splits."""
    below = (child(data, (name,)) for names in SPLITS.values() for name in names)
    return [data, *(folder for folder in below if folder is not None and folder.is_dir())]


def _yaml_in(folder: Path) -> Path | None:
    named = [folder / name for name in YAML_NAMES if (folder / name).is_file()]
    others = [f for f in files_in(folder, *SUFFIXES) if "names:" in (text := read_text(f)) and "train:" in text]
    if not named and len(others) > 1:
        raise UserError(f"{folder}: more than one YOLO yaml: {', '.join(f.name for f in others)}", "Name the one.")
    return next(iter(named + others), None)


def _from_yaml(file: Path) -> dict[str, SplitFiles]:
    content = load_yaml(file)
    if not given(content, SPLITS["train"]):
        raise UserError(f"{file}: no `train:` (found: {', '.join(map(str, content))})", SHAPE)
    found = {}
    for split, names in SPLITS.items():
        texts = given(content, names)
        if not texts:
            continue
        paths = [locate(text, file, content) for text in texts]
        missing = [text for text, path in zip(texts, paths, strict=True) if path is None]
        if not missing:
            found[split] = SplitFiles(file, tuple(p for p in paths if p is not None))
        elif split != "test":  # which many yaml files name without having it
            raise UserError(
                f"{file}: `{split}: {missing[0]}` is not there", "Correct the path, or `path:`, or take the line out."
            )
    return found


def _from_class_list(data: Path, file: Path) -> dict[str, SplitFiles] | None:
    found = {}
    for split, names in SPLITS.items():
        places = [data / pattern.format(n) for n in names for pattern in ("images/{}", "{}/images", "{}.txt", "{}")]
        images = next((p for p in places if p.exists()), None)
        if images is not None:
            found[split] = SplitFiles(file, (images,))
    if not found and (data / "images").is_dir():
        found["train"] = SplitFiles(file, (data / "images",))
    elif not found and _labelled(data):
        found["train"] = SplitFiles(file, (data,))
    return found if "train" in found else None


def _labelled(folder: Path) -> bool:
    """Whether images lie in it that have label files beside them, as LabelImg leaves them, or in its `labels/`."""
    images = files_in(folder, *image_suffixes())
    return any(file is not None for file in _label_files(images)[1])


def labels_without_names(data: Path) -> Path | None:
    """A label file of a folder in which nothing names the classes; None where there is none."""
    texts = (file for folder in [data, *subfolders(data, depth=2)] for file in files_in(folder, ".txt")[:SNIFFED])
    for file in texts:
        labels = read_labels(file)
        if labels.labels and not labels.malformed and all(max(label.box) <= 1 for label in labels.labels):
            return file
    return None


# Reading


class Split(NamedTuple):
    """The files of one split, and what is in them."""

    images: list[Path]
    files: list[Path | None]  # the label file of each image, where there is one
    folders: list[Path]  # where it was looked for
    read: list[Labels]
    notes: list[Finding]


def read_yolo(splits: Mapping[str, SplitFiles], wanted: Sequence[str]) -> dict[str, RawDataset]:
    """The wanted splits: images with the boxes of their label files.

    What lines of more than five fields are is decided once for all of them, training being asked too.
    """
    read = {split: _read(splits[split], split) for split in wanted}
    asked = list(read.values())
    if (
        "train" not in read
        and "train" in splits
        and any(label.around for s in asked for r in s.read for label in r.labels)
    ):
        asked.append(_read(splits["train"], "train"))
    source = next(iter(splits.values())).annotations
    said = keypoints(source)
    way = meaning([r for s in asked for r in s.read], [f for s in asked for f in s.files], said)
    used = {f for s in asked for f in s.files if f is not None}
    return {split: _dataset(split, splits[split], read[split], way, said, used) for split in wanted}


def _read(files: SplitFiles, split: str) -> Split:
    notes: list[Finding] = []
    listed = [image for place in files.images for image in _listed(place, files.annotations, split, notes)]
    images = list(dict.fromkeys(listed))
    folders, label_files = _label_files(images)
    return Split(images, label_files, folders, map_threads(read_labels, label_files), notes)


def _listed(place: Path, source: Path, split: str, notes: list[Finding]) -> Iterator[Path]:
    """The images of a folder, or those that a text file names, on this machine or another one."""
    if place.is_dir():
        yield from list_images(place)
        return
    names = [line.strip() for line in read_text(place).splitlines() if line.strip()]
    roots = [place.parent, source.parent, place.parent.parent]
    root = next((r for r in roots if any((r / name).exists() for name in names[:8])), place.parent)
    found = real_names(names, root, nearby=[source.parent])
    notes += renaming_notes(split, place, found)
    yield from (Path(os.path.normpath(root / name)) for name in found.names)


def _label_files(images: Sequence[Path]) -> tuple[list[Path], list[Path | None]]:
    """For each image the folder of its label file, and the file: the image's name, in any case, with `.txt`."""
    stems: dict[Path, set[str]] = defaultdict(set)
    for image in images:
        stems[image.parent].add(fold(image.stem))
    chosen = {parent: _label_folder(parent, own) for parent, own in stems.items()}
    there = {folder: _by_stem(folder) for folder in set(chosen.values())}
    folders = [chosen[image.parent] for image in images]
    return folders, [_pick(there[f].get(fold(i.stem), []), i.stem) for f, i in zip(folders, images, strict=True)]


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for file in files_in(folder, ".txt"):
        found[fold(file.stem)].append(file)
    return found


def _pick(files: Sequence[Path], stem: str) -> Path | None:
    """The file that has the very letters, else the only one."""
    exact = [file for file in files if file.stem == stem]
    return exact[0] if exact else files[0] if len(files) == 1 else None


def _label_folder(images: Path, stems: set[str]) -> Path:
    """`labels/` in place of the last `images/`, or in the folder of images, or this itself: where the files are."""
    parts = images.parts
    places = []
    for last in (i for i in reversed(range(len(parts))) if fold(parts[i]) in IMAGES):
        tails = [parts[last + 1 : end] for end in range(len(parts), last, -1)]  # then all labels in one folder
        found = _called_labels(Path(*parts[:last]))
        places += [p for tail in tails for f in found if (p := f.joinpath(*tail)).is_dir()]
        break
    places += [*_called_labels(images), images]
    return next((place for place in places if stems & _by_stem(place).keys()), places[0])


def _called_labels(folder: Path) -> list[Path]:
    try:
        found = [entry for entry in folder.iterdir() if fold(entry.name) in LABELS]
    except OSError:
        return []
    return sorted(found, key=lambda f: (LABELS.index(fold(f.name)), f.name))


def _dataset(
    split: str, files: SplitFiles, own: Split, way: Meaning, said: Keypoints | None, used: set[Path]
) -> RawDataset:
    source = files.annotations
    root = common_root(own.images, source.parent)
    names = class_names(source)
    label_files = [f or d / f"{i.stem}.txt" for i, d, f in zip(own.images, own.folders, own.files, strict=True)]
    findings = [*own.notes, *_class_count(source, names, split)]
    findings += _of_lines(own, label_files, split, way, said)
    findings += _shared(own, split)
    findings += _long_lines(own, label_files, source, split, way, said)
    findings += _in_pixels(own.read, source, split, way)
    findings += _orphans(own, files, split, used)
    head = {
        "split": split,
        "source": source,
        "root": root,
        "categories": names,
        "label_files": tuple(str(file) for file in label_files),
        "findings": tuple(findings),
    }
    # Shares are of the picture that was labelled, and it was labelled as viewers show it. The doctor says which fail.
    sizes = read_sizes(own.images)
    images = [(i.relative_to(root).as_posix(), *size) for i, size in zip(own.images, sizes.tolist(), strict=True)]
    return from_columns(head, images, _rows(own.read, sizes.tolist(), way, said))


def _class_count(source: Path, names: Sequence[tuple[int, str]], split: str) -> Iterator[Finding]:
    count = class_count(source)
    if count is not None and count != len(names):
        yield finding("class-count", split, source, f"`nc: {count}`, but `names` has {len(names)}")


def _of_lines(
    own: Split, label_files: Sequence[Path], split: str, way: Meaning, said: Keypoints | None
) -> Iterator[Finding]:
    """Files that cannot be read, and lines that are no labels."""
    for row, (file, read) in enumerate(zip(label_files, own.read, strict=True)):
        if read.problem:
            yield finding("unreadable-labels", split, file, read.problem, row=row)
        odd = ((label.line, wrong_length(label, way, said)) for label in read.labels)
        for line, what in sorted([*read.malformed, *((n, f"line {n}: {why}") for n, why in odd if why)]):
            yield finding("malformed-label", split, file, what, line=line)


def _shared(own: Split, split: str) -> Iterator[Finding]:
    """Pictures that differ in their suffix and have one label file: unless they are copies, whose it is is unknown."""
    owners: dict[Path, list[int]] = defaultdict(list)
    for row, file in enumerate(own.files):
        if file is not None:
            owners[file].append(row)
    for file, rows in owners.items():
        images = [own.images[row] for row in rows]
        if len(rows) < 2 or len({_content(image) for image in images}) == 1:
            continue
        for row in rows:
            what = f"{file.name} could belong to {' or '.join(i.name for i in images)}"
            yield finding("shared-labels", split, own.images[row], what, row=row)


def _content(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError:
        return b""


def _long_lines(
    own: Split, label_files: Sequence[Path], source: Path, split: str, way: Meaning, said: Keypoints | None
) -> Iterator[Finding]:
    """What was assumed of long lines where the yaml does not say it."""
    rows = [row for row, read in enumerate(own.read) if any(label.around for label in read.labels)]
    if not rows or said is not None or way == "polygons":
        return
    fields = Counter(label.fields for row in rows for label in own.read[row].labels if label.around)
    listed = ", ".join(str(count) for count, _ in fields.most_common(4))
    if way == "keypoints":
        what = f"lines of {listed} fields are read as a box with keypoints behind it, which are passed over"
        yield finding("keypoints", split, source, what, count=fields.total())
        return
    for row in rows:
        what = f"lines of {listed} fields could be polygons, or boxes with keypoints behind them"
        yield finding("unclear-labels", split, label_files[row], what, row=row)


def _rows(
    read: Sequence[Labels], sizes: Sequence[Sequence[int]], way: Meaning, said: Keypoints | None
) -> Iterator[tuple[int, int, int, tuple[float, ...]]]:
    for row, (labels, size) in enumerate(zip(read, sizes, strict=True)):
        height, width = (max(side, 1) for side in size)
        for label in labels.labels:
            if label.around is not None and (way == "unclear" or wrong_length(label, way, said)):
                continue
            x, y, w, h = label.around if label.around is not None and way == "polygons" else label.box
            yield row, label.line, label.category, (x * width, y * height, w * width, h * height)


def _in_pixels(read: Sequence[Labels], source: Path, split: str, way: Meaning) -> list[Finding]:
    rows = [label.around if label.around and way == "polygons" else label.box for own in read for label in own.labels]
    boxes = np.array(rows).reshape(-1, 4)
    far = (np.abs(boxes) > IN_PIXELS).any(axis=1)
    if not len(boxes) or far.mean() < 0.5:
        return []
    what = f"{far.sum()} of {len(boxes)} boxes have coordinates far above 1: they look like pixels"
    return [finding("pixel-boxes", split, source, what, count=int(far.sum()))]


def _orphans(own: Split, files: SplitFiles, split: str, used: set[Path]) -> list[Finding]:
    """Label files that are not `used` by any split. Where text files list the images, the others belong elsewhere."""
    if not all(place.is_dir() for place in files.images):
        return []
    folders = set(own.folders) - {image.parent for image in own.images}  # else README.txt would be one
    found = [f for folder in sorted(folders) for f in files_in(folder, ".txt") if f not in used]
    what = "a label file without an image of this name"
    return [finding("label-without-image", split, f, what) for f in found if f.name != "classes.txt"]
