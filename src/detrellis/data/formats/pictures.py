"""The picture that belongs to an annotation file: called like the file, or as the file says.

`image_folder` finds the folder in which the pictures are, `pictures_of` the picture of each file.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from detrellis.data.files import files_in, is_image, list_images, subfolders
from detrellis.data.formats.lookup import ResolvedNames, fold, readings, real_names, split_named
from detrellis.data.splits import SplitFiles, both_parts
from detrellis.errors import UserError

# Folders that are called like pictures, in the order in which they are preferred.
USUAL = ("jpegimages", "images", "image", "imgs", "img", "pictures", "photos")
SAMPLE = 24  # annotation files that decide which folder holds their pictures
DEPTH = 3  # folders below one that is searched
MAX_FILES = 200  # of a folder that are opened to see what they are

Item = TypeVar("Item")
GivenImages = Mapping[str, Path | None]  # split -> the image folder that the user named


class PictureName(NamedTuple):
    """What an annotation file tells about the name of its picture."""

    stem: str  # of the annotation file itself, with its folders: "seq1/0001"
    written: str  # the picture's name as the file has it; "" where there is none


class PictureCounts(NamedTuple):
    """How many of the wanted pictures are in a folder or below it; the larger, the better."""

    by_written_name: int
    by_stem: int  # called like their annotation files, or as written but for the suffix


def spread(items: Sequence[Item], limit: int = SAMPLE) -> list[Item]:
    """At most `limit` items, evenly spaced over the list."""
    step = max(1, -(-len(items) // limit))
    return list(items[::step])


def listed(items: Iterable[object]) -> str:
    """The items as lines of a message."""
    return "".join(f"\n    {item}" for item in items)


# The folder


def image_folder(
    annotations: Path, places: Sequence[Path], pictures: Sequence[PictureName]
) -> Path:
    """The folder, in one of `places` or below,
    in which the pictures of a sample of annotation files are.

    Preferred is a folder that is called like `annotations`, then one of a usual name, if it holds
    at least half as many of them as the best folder; then the one with most pictures of written
    names. Raises `UserError` where no folder has any, or two have as many, and where `pictures` is
    empty.
    """
    if not pictures:
        raise UserError(f"{annotations}: lists no pictures", "Is it the right file? Is it whole?")
    for place in dict.fromkeys(places):
        counts = _count_pictures(place, pictures)
        best = max(counts.values())
        if not best.by_stem:
            continue
        if (usual := _usual_folder(annotations, counts, best)) is not None:
            return usual
        tied = [folder for folder, count in counts.items() if count == best]
        deepest = [folder for folder in tied if not any(folder in other.parents for other in tied)]
        if len(deepest) == 1:
            return deepest[0]
        what = f"{annotations}: its pictures could be in{listed(deepest)}"
        raise UserError(what, "Say which with `--train-images FOLDER`.")
    raise UserError(
        _not_found(annotations, places, pictures), "Name their folder with `--train-images FOLDER`."
    )


def _usual_folder(
    annotations: Path, counts: Mapping[Path, PictureCounts], best: PictureCounts
) -> Path | None:
    """A folder that is called like the annotations or like pictures, and holds enough of them."""
    names = [fold(annotations.name), *USUAL]
    usual = [
        f
        for f, count in counts.items()
        if fold(f.name) in names and 2 * count.by_stem >= best.by_stem
    ]

    def order(folder: Path) -> tuple[bool, int, int]:
        rank = names.index(fold(folder.name))
        return rank > 0, -counts[folder].by_stem, rank

    return min(usual, key=order, default=None)


def _count_pictures(place: Path, pictures: Sequence[PictureName]) -> dict[Path, PictureCounts]:
    """The pictures in `place` and in each folder below it, those in its own folders included."""
    names = {fold(parts[-1]) for picture in pictures for parts in readings(picture.written)[:1]}
    stems = {fold(Path(picture.stem).name) for picture in pictures}
    stems |= {os.path.splitext(name)[0] for name in names}
    by_name: dict[Path, set[str]] = {}
    by_stem: dict[Path, set[str]] = {}
    for folder in [place, *subfolders(place, DEPTH)]:
        images = {fold(name) for name in os.listdir(folder) if is_image(name)}
        image_stems = {os.path.splitext(name)[0] for name in images}
        # What is in a folder counts for those above it, up to `place`.
        for holder in (folder, *folder.parents):
            if holder == place or place in holder.parents:
                by_name.setdefault(holder, set()).update(names & images)
                by_stem.setdefault(holder, set()).update(stems & image_stems)
    return {folder: PictureCounts(len(by_name[folder]), len(by_stem[folder])) for folder in by_name}


def _not_found(annotations: Path, places: Sequence[Path], pictures: Sequence[PictureName]) -> str:
    names = f"{Path(pictures[0].stem).name}.*"
    if pictures[0].written:
        names = f"{names} or {pictures[0].written!r}"
    searched = f"these and {DEPTH} levels below{listed(dict.fromkeys(places))}"
    return f"{annotations}: its pictures were not found; looked for {names} in {searched}"


# Formats of one file a split: CSV and VIA


class OneFileFormat(NamedTuple):
    """A format whose splits are one annotation file each."""

    # Files of a later one count only where there are none of an earlier one
    suffixes: tuple[str, ...]
    called: str  # what messages call several such files
    recognises: Callable[[Path], bool]
    image_names: Callable[[Path], Sequence[str]]  # of a file


def find_one_file(
    layout: OneFileFormat, data: Path, images: GivenImages
) -> dict[str, SplitFiles] | None:
    """The splits of a folder with files of this format; None where there are none.

    Raises `UserError` where the files' names, or their folders', do not tell the splits.
    """
    folders = [data, *subfolders(data, 1)]
    files: list[Path] = []
    for suffix in layout.suffixes:
        candidates = [f for folder in folders for f in files_in(folder, suffix)[:MAX_FILES]]
        files = files or [file for file in candidates if layout.recognises(file)]
    if not files:
        return None
    splits = {split: f for f in files if (split := split_named(f.stem, f.parent.name)) is not None}
    if len(files) == 1 and splits.keys() <= {"train"}:
        return one_file_splits(layout, {"train": files[0]}, images, data, parts=not splits)
    if len(splits) < len(files) or "train" not in splits:
        names = listed(f.relative_to(data) for f in files)
        example = f"FILE{files[0].suffix.lower()}"
        raise UserError(
            f"{data}: {layout.called} whose names do not say which split each is:{names}",
            f"Name them: --train {example} --val {example}.",
        )
    return one_file_splits(layout, splits, images, data)


def one_file_splits(
    layout: OneFileFormat,
    files: Mapping[str, Path],
    images: GivenImages,
    data: Path | None = None,
    parts: bool = False,
) -> dict[str, SplitFiles]:
    """The file of each split with its image folder:
    the given one, or the one found near the file or in `data`.

    `parts`: the one file is train and val together.
    """
    splits = {}
    for split, path in files.items():
        file = path.resolve()
        folder = images.get(split) or images.get("train") or _images_near(layout, file, data)
        splits[split] = SplitFiles(file, (folder.resolve(),))
    if parts:
        return both_parts(splits["train"])
    return splits


def _images_near(layout: OneFileFormat, file: Path, data: Path | None) -> Path:
    sample = spread([Path(name.replace("\\", "/")) for name in layout.image_names(file)])
    pictures = [PictureName(os.path.splitext(path)[0], str(path)) for path in sample]
    return image_folder(file, (file.parent, data or file.parent.parent), pictures)


# The pictures


def pictures_of(pictures: Sequence[PictureName], folder: Path) -> ResolvedNames:
    """The picture in `folder` of each annotation file, in this order:
    called like the file, or as the file says.

    In this order, because what stands in a file goes stale when files are renamed. Of two pictures
    that are called like the file but for their suffix the one counts that the file names; where it
    names neither, none is taken.
    """
    index = _PictureIndex([path.relative_to(folder).as_posix() for path in list_images(folder)])
    names, unclear = [""] * len(pictures), dict[int, tuple[str, ...]]()
    # Called like the file.
    for place, (stem, written) in enumerate(pictures):
        options = index.of(stem)
        picked = _pick(options, stem, written)
        if picked is None and options:
            unclear[place] = tuple(options)
        names[place] = picked or ("" if written and not options else stem)
    # As the file says.
    open_places = [place for place, name in enumerate(names) if not name]
    resolved = real_names([pictures[place].written for place in open_places], folder)
    renamed = {open_places[place]: written for place, written in resolved.renamed.items()}
    unclear |= {open_places[place]: files for place, files in resolved.unclear.items()}
    # As the file says but for the suffix.
    for place, name in zip(open_places, resolved.names, strict=True):
        settled = name in index or place in renamed or place in unclear
        options = [] if settled else index.of(os.path.splitext(name)[0])
        names[place] = options[0] if len(options) == 1 else name
    return ResolvedNames(tuple(names), renamed, unclear)


class _PictureIndex:
    """The pictures of a folder by name without suffix, in any case and Unicode form."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)
        self.by_path: Mapping[str, list[str]] = defaultdict(list)
        self.by_stem: Mapping[str, list[str]] = defaultdict(list)
        for name in names:
            path = fold(os.path.splitext(name)[0])
            self.by_path[path].append(name)
            self.by_stem[path.rpartition("/")[2]].append(name)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def of(self, stem: str) -> list[str]:
        """The pictures of this name in the same sub-folder, else those anywhere."""
        parts = next(iter(readings(stem)), ("",))
        return self.by_path.get(fold("/".join(parts))) or self.by_stem.get(fold(parts[-1])) or []


def _pick(options: Sequence[str], stem: str, written: str) -> str | None:
    """The only option, or the only one that the file names, or the only one of exactly the stem."""
    if len(options) == 1:
        return options[0]
    tail = "/" + "/".join(next(iter(readings(written)), ("",)))
    last = "/" + tail.rpartition("/")[2]
    ways = (
        [name for name in options if f"/{name}".endswith(tail)],
        [name for name in options if f"/{name}".endswith(last)],
        [name for name in options if os.path.splitext(name)[0] == stem],
    )
    return next((way[0] for way in ways if len(way) == 1), None)
