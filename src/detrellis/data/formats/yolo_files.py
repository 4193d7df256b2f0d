"""Which files of a folder are YOLO's:
the yaml or the list of classes, the images of each split, and the label file of each image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from detrellis.data.files import files_in, image_suffixes, read_text, subfolders
from detrellis.data.formats import yolo_yaml
from detrellis.data.formats.lookup import child, fold
from detrellis.data.formats.yolo_labels import read_labels
from detrellis.data.splits import SPLITS, SplitFiles, both_parts
from detrellis.errors import UserError

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
# At the top, or in a split's folder
CLASS_LISTS = ("classes.txt", "obj.names", "labels/classes.txt")
# Folders that have one of labels beside them
IMAGES = ("images", "image", "imgs", "img", "jpegimages")
PLACES = ("images/{}", "{}/images", "{}.txt", "{}")  # of a split's images, where no yaml says it
LABELS = ("labels", "label", "annotations")
SNIFFED = 8  # files of a folder that are opened to see what they are


def find_yolo(data: Path) -> dict[str, SplitFiles] | None:
    """The splits of a yaml file, or of a folder with one; None where there is neither."""
    file = data if data.suffix.lower() in yolo_yaml.SUFFIXES else _yaml_in(data)
    if file is not None:
        return _from_yaml(file)
    places = [folder / name for folder in _folders_of_splits(data) for name in CLASS_LISTS]
    lists = [place for place in places if place.is_file()]
    if len({yolo_yaml.class_names(file) for file in lists}) > 1:
        listed = ", ".join(file.relative_to(data).as_posix() for file in lists)
        raise UserError(
            f"{data}: lists of classes that differ: {listed}", "Make them the same, or leave one."
        )
    return _from_class_list(data, lists[0]) if lists else None


def _folders_of_splits(data: Path) -> list[Path]:
    """The folder itself, then those called like splits."""
    below = (child(data, (name,)) for names in SPLITS.values() for name in names)
    return [data, *(folder for folder in below if folder is not None and folder.is_dir())]


def _yaml_in(folder: Path) -> Path | None:
    named = [folder / name for name in YAML_NAMES if (folder / name).is_file()]
    texts = {file: read_text(file) for file in files_in(folder, *yolo_yaml.SUFFIXES)}
    others = [file for file, text in texts.items() if "names:" in text and "train:" in text]
    if not named and len(others) > 1:
        raise UserError(
            f"{folder}: more than one YOLO yaml: {', '.join(f.name for f in others)}",
            "Name the one.",
        )
    return next(iter(named + others), None)


def _from_yaml(file: Path) -> dict[str, SplitFiles]:
    content = yolo_yaml.load_yaml(file)
    if not yolo_yaml.given(content, SPLITS["train"]):
        raise UserError(
            f"{file}: no `train:` (found: {', '.join(map(str, content))})", yolo_yaml.SHAPE
        )
    splits = {}
    for split, names in SPLITS.items():
        texts = yolo_yaml.given(content, names)
        paths = [yolo_yaml.locate(text, file, content) for text in texts]
        missing = [text for text, path in zip(texts, paths, strict=True) if path is None]
        if texts and not missing:
            splits[split] = SplitFiles(file, tuple(path for path in paths if path is not None))
        elif missing and split != "test":  # which many yaml files name without having it
            what = f"{file}: `{split}: {missing[0]}` is not there"
            raise UserError(what, "Correct the path, or `path:`, or take the line out.")
    return splits


def _from_class_list(data: Path, file: Path) -> dict[str, SplitFiles] | None:
    splits = {}
    for split, names in SPLITS.items():
        places = (data / pattern.format(name) for name in names for pattern in PLACES)
        images = next((place for place in places if place.exists()), None)
        if images is not None:
            splits[split] = SplitFiles(file, (images,))
    if not splits and (data / "images").is_dir():
        splits = both_parts(SplitFiles(file, (data / "images",)))
    elif not splits and _labelled(data):
        splits = both_parts(SplitFiles(file, (data,)))
    return splits if "train" in splits else None


def _labelled(folder: Path) -> bool:
    """Whether images lie in it that have label files beside them,
    as LabelImg leaves them, or in its `labels/`.
    """
    images = files_in(folder, *image_suffixes())
    return any(file is not None for file in label_files_of(images)[1])


def labels_without_names(data: Path) -> Path | None:
    """A label file of a folder in which nothing names the classes; None where there is none."""
    folders = [data, *subfolders(data, depth=2)]
    for file in (file for folder in folders for file in files_in(folder, ".txt")[:SNIFFED]):
        labels, malformed, _ = read_labels(file)
        if labels and not malformed and all(max(label.box) <= 1 for label in labels):
            return file
    return None


def label_files_of(images: Sequence[Path]) -> tuple[list[Path], list[Path | None]]:
    """For each image the folder of its label file, and the file:
    the image's name, in any case, with `.txt`.
    """
    stems: dict[Path, set[str]] = defaultdict(set)
    for image in images:
        stems[image.parent].add(fold(image.stem))
    label_folders = {parent: _label_folder(parent, names) for parent, names in stems.items()}
    by_stem = {folder: _by_stem(folder) for folder in set(label_folders.values())}
    folders = [label_folders[image.parent] for image in images]
    files = []
    for folder, image in zip(folders, images, strict=True):
        files.append(_pick(by_stem[folder].get(fold(image.stem), []), image.stem))
    return folders, files


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    """The text files of a folder by their folded names without suffix."""
    files: dict[str, list[Path]] = defaultdict(list)
    for file in files_in(folder, ".txt"):
        files[fold(file.stem)].append(file)
    return files


def _pick(files: Sequence[Path], stem: str) -> Path | None:
    """The file that is called exactly so, else the only one."""
    exact = [file for file in files if file.stem == stem]
    if exact:
        return exact[0]
    return files[0] if len(files) == 1 else None


def _label_folder(images: Path, stems: set[str]) -> Path:
    """`labels/` in place of the last `images/`, or in the folder of images, or this itself:
    where the files are.
    """
    parts = images.parts
    places = []
    last = max((i for i, part in enumerate(parts) if fold(part) in IMAGES), default=None)
    if last is not None:
        # Then all labels in one folder
        tails = [parts[last + 1 : end] for end in range(len(parts), last, -1)]
        label_folders = _called_labels(Path(*parts[:last]))
        places = [folder.joinpath(*tail) for tail in tails for folder in label_folders]
    places = [*(place for place in places if place.is_dir()), *_called_labels(images), images]
    return next((place for place in places if stems & _by_stem(place).keys()), places[0])


def _called_labels(folder: Path) -> list[Path]:
    try:
        folders = [entry for entry in folder.iterdir() if fold(entry.name) in LABELS]
    except OSError:
        return []
    return sorted(folders, key=lambda f: (LABELS.index(fold(f.name)), f.name))
