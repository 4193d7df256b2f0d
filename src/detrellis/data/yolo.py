"""YOLO's layout: `data.yaml` (or `classes.txt`), images, and a text file of labels for each image.

A label line is `class cx cy w h` in shares of the image; a longer one with an odd number of fields is a polygon
(`class x1 y1 x2 y2 ...`), of which the bounding box is taken, unless `kpt_shape` in the yaml says that keypoints follow
the box. An image without a label file has no boxes. Class numbers are the category ids: 0, 1, ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from detrellis.data.decode import read_header, upright_size
from detrellis.data.files import common_root, list_images, map_threads, read_text
from detrellis.data.findings import Finding, finding
from detrellis.data.records import RawDataset, from_columns
from detrellis.data.splits import SPLITS, SplitFiles
from detrellis.errors import UserError

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
CLASS_LISTS = ("classes.txt", "obj.names", "labels/classes.txt")
SHAPE = "data.yaml needs `names:` (a list, or numbers to names) and `train:`, and should have `val:`."
IN_PIXELS = 1.5  # shares above this are no drawing errors at the border


class Label(NamedTuple):
    """One line of a label file."""

    line: int
    category: int
    box: tuple[float, float, float, float]  # x, y, width, height in shares of the image


class Labels(NamedTuple):
    """One label file with the size of its image."""

    size: tuple[int, int]  # height, width; 0, 0 where the image cannot be opened
    labels: list[Label]
    malformed: list[tuple[int, str]]  # (line, what is wrong)


# Finding


def find_yolo(data: Path) -> dict[str, SplitFiles] | None:
    """The splits of a yaml file, or of a folder with one; None where there is neither."""
    file = data if data.suffix.lower() in (".yaml", ".yml") else _yaml_in(data)
    if file is not None:
        return _from_yaml(file)
    lists = [data / name for name in CLASS_LISTS if (data / name).is_file()]
    return _from_class_list(data, lists[0]) if lists else None


def _yaml_in(folder: Path) -> Path | None:
    named = [folder / name for name in YAML_NAMES if (folder / name).is_file()]
    others = [f for f in sorted(folder.glob("*.y*ml")) if "names:" in read_text(f) and "train:" in read_text(f)]
    if not named and len(others) > 1:
        raise UserError(f"{folder}: more than one YOLO yaml: {', '.join(f.name for f in others)}", "Name the one.")
    return next(iter(named + others), None)


def _from_yaml(file: Path) -> dict[str, SplitFiles]:
    content = load_yaml(file)
    if not content.get("train"):
        raise UserError(f"{file}: no `train:` (found: {', '.join(map(str, content))})", SHAPE)
    found = {}
    for split, names in SPLITS.items():
        entries = next((content[name] for name in names if content.get(name)), None)
        if entries is None:
            continue
        texts = entries if isinstance(entries, list) else [entries]
        paths = [_locate(str(text), file, content) for text in texts]
        missing = [text for text, path in zip(texts, paths, strict=True) if path is None]
        if not missing:
            found[split] = SplitFiles(file, tuple(p for p in paths if p is not None))
        elif split != "test":  # which many yaml files name without having it
            raise UserError(f"{file}: `{split}: {missing[0]}` is not there", f"Correct the path, or `path:`. {SHAPE}")
    return found


def _locate(text: str, file: Path, content: Mapping[str, Any]) -> Path | None:
    """The folder or list that the yaml means, also when it was written for another machine or working folder."""
    given = Path(text)
    roots = [file.parent / str(content["path"])] if content.get("path") else []
    places = [root / given for root in [*roots, file.parent]]
    # Exporters write "../train/images" beside the train folder, or "/content/set/train/images" from a notebook.
    parts = [p for p in given.parts if p not in ("..", ".", given.anchor)]
    places += [file.parent.joinpath(*parts[i:]) for i in range(max(1, len(parts) - 1))]
    return next((place.resolve() for place in places if place.exists()), None)


def _from_class_list(data: Path, file: Path) -> dict[str, SplitFiles] | None:
    found = {}
    for split, names in SPLITS.items():
        places = [data / pattern.format(n) for n in names for pattern in ("images/{}", "{}/images", "{}.txt", "{}")]
        images = next((p for p in places if p.exists()), None)
        if images is not None:
            found[split] = SplitFiles(file, (images,))
    if not found and (data / "images").is_dir():
        found["train"] = SplitFiles(file, (data / "images",))
    return found if "train" in found else None


def load_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a yaml file. Raises `UserError` with the line where it is malformed."""
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: malformed yaml ({' '.join(str(error).split())})", SHAPE) from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a yaml mapping", SHAPE)
    return content


def class_names(file: Path) -> tuple[tuple[int, str], ...]:
    """(id, name) from `names:` of a yaml file, or from the lines of a class list."""
    if file.suffix.lower() not in (".yaml", ".yml"):
        lines = [line.strip() for line in read_text(file).splitlines()]
        return tuple(enumerate(line for line in lines if line))
    names = load_yaml(file).get("names")
    if isinstance(names, list) and names:
        return tuple((i, str(name)) for i, name in enumerate(names))
    if isinstance(names, dict) and names and all(str(key).isdigit() for key in names):
        return tuple(sorted((int(key), str(name)) for key, name in names.items()))
    raise UserError(f"{file}: `names:` is {'missing' if names is None else repr(names)[:80]}", SHAPE)


# Reading


def read_yolo(files: SplitFiles, split: str) -> RawDataset:
    """The split's images with the boxes of their label files."""
    source = files.annotations
    keypoints = source.suffix.lower() in (".yaml", ".yml") and "kpt_shape" in load_yaml(source)
    images = list(dict.fromkeys(image for place in files.images for image in _listed(place, source)))
    label_files = _label_files(images)
    pairs = list(zip(images, label_files, strict=True))
    read = map_threads(partial(_read_labels, keypoints=keypoints), pairs)
    root = common_root(images, source.parent)
    findings = [
        finding("malformed-label", split, file, what, line=line)
        for file, labels in zip(label_files, read, strict=True)
        for line, what in labels.malformed
    ]
    findings += _in_pixels(read, source, split)
    findings += _orphans(images, label_files, files, split)
    head = {
        "split": split,
        "source": source,
        "root": root,
        "categories": class_names(source),
        "label_files": tuple(str(file) for file in label_files),
        "findings": tuple(findings),
    }
    sizes = [(image.relative_to(root).as_posix(), *labels.size) for image, labels in zip(images, read, strict=True)]
    return from_columns(head, sizes, _rows(read))


def _listed(place: Path, source: Path) -> Iterator[Path]:
    """The images of a folder, or those that a text file names."""
    if place.is_dir():
        yield from list_images(place)
        return
    names = [line.strip() for line in read_text(place).splitlines() if line.strip()]
    roots = [place.parent, source.parent, place.parent.parent]
    root = next((r for r in roots if any((r / name).exists() for name in names[:8])), place.parent)
    yield from (Path(os.path.normpath(root / name)) for name in names)


def _label_files(images: Sequence[Path]) -> list[Path]:
    """For each image the file in `labels/` in place of the last `images/`, or beside it where that folder is not."""
    folders = {parent: _label_folder(parent) for parent in {image.parent for image in images}}
    return [folders[image.parent] / f"{image.stem}.txt" for image in images]


def _label_folder(images: Path) -> Path:
    parts = list(images.parts)
    if "images" not in parts:
        return images
    last = len(parts) - 1 - parts[::-1].index("images")
    labels = Path(*parts[:last], "labels", *parts[last + 1 :])
    return labels if labels.is_dir() else images


def _read_labels(pair: tuple[Path, Path], keypoints: bool) -> Labels:
    image, file = pair
    try:
        # Shares are of the picture that was labelled, and it was labelled as viewers show it.
        size = upright_size(read_header(image))
    except UserError:
        size = (0, 0)  # the doctor opens it again and says why
    labels, malformed = [], []
    for number, line in enumerate(read_text(file).splitlines() if file.is_file() else (), start=1):
        if not line.strip():
            continue
        try:
            category, box = parse_line(line, keypoints)
            labels.append(Label(number, category, box))
        except ValueError as error:
            malformed.append((number, f"line {number}: {error}: {line.strip()[:60]!r}"))
    return Labels(size, labels, malformed)


def parse_line(line: str, keypoints: bool = False) -> tuple[int, tuple[float, float, float, float]]:
    """(class, xywh in shares of the image) of a label line. Raises `ValueError` saying what is wrong with it."""
    fields = line.split()
    try:
        category, *numbers = (float(field) for field in fields)
    except ValueError:
        raise ValueError("not all fields are numbers") from None
    if category != int(category) if np.isfinite(category) else True:
        raise ValueError("the class is no whole number")
    if len(fields) == 5 or (keypoints and len(fields) > 5):
        x, y, width, height = numbers[:4]
        return int(category), (x - width / 2, y - height / 2, width, height)
    if len(fields) < 7 or len(fields) % 2 == 0:
        raise ValueError(f"{len(fields)} fields, neither a box (5) nor a polygon (odd, at least 7)")
    xs, ys = numbers[::2], numbers[1::2]
    return int(category), (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))


def _rows(read: Sequence[Labels]) -> Iterator[tuple[int, int, int, tuple[float, ...]]]:
    for row, (size, labels, _) in enumerate(read):
        height, width = (max(side, 1) for side in size)
        for line, category, (x, y, w, h) in labels:
            yield row, line, category, (x * width, y * height, w * width, h * height)


def _in_pixels(read: Sequence[Labels], source: Path, split: str) -> list[Finding]:
    boxes = np.array([label.box for labels in read for label in labels.labels]).reshape(-1, 4)
    far = (np.abs(boxes) > IN_PIXELS).any(axis=1)
    if not len(boxes) or far.mean() < 0.5:
        return []
    what = f"{far.sum()} of {len(boxes)} boxes have coordinates far above 1: they look like pixels"
    return [finding("pixel-boxes", split, source, what, count=int(far.sum()))]


def _orphans(images: Sequence[Path], labels: Sequence[Path], files: SplitFiles, split: str) -> list[Finding]:
    """Label files without an image. Where text files list the images, the others belong to other splits."""
    if not all(place.is_dir() for place in files.images):
        return []
    known = set(labels)
    folders = {file.parent for file in labels} - {image.parent for image in images}  # else README.txt would be one
    found = [f for folder in sorted(folders) for f in sorted(folder.glob("*.txt")) if f not in known]
    what = "a label file without an image of this name"
    return [finding("label-without-image", split, f, what) for f in found if f.name != "classes.txt"]
