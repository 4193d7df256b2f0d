"""The picture that belongs to an annotation file: called like the file, or as the file says.

`image_folder` finds the folder in which the pictures are, `pictures_of` the picture of each file.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from detrellis.data.files import is_image, list_images, subfolders
from detrellis.data.formats.lookup import Names, fold, readings, real_names, split_named
from detrellis.data.splits import SplitFiles
from detrellis.errors import UserError

# Folders that are called like pictures, in the order in which they are preferred.
USUAL = ("jpegimages", "images", "image", "imgs", "img", "pictures", "photos")
SAMPLE = 24  # annotation files that decide which folder holds their pictures
DEPTH = 3  # folders below one that is searched


class Wanted(NamedTuple):
    """What an annotation file says of its picture."""

    stem: str  # of the annotation file itself, with its folders: "seq1/0001"
    written: str  # the picture's name in the file; "" where there is none


def spread(items: Sequence[Path], most: int = SAMPLE) -> list[Path]:
    """At most so many, from the whole of a list."""
    step = max(1, -(-len(items) // most))
    return list(items[::step])


# The folder


def image_folder(annotations: Path, places: Sequence[Path], wanted: Sequence[Wanted]) -> Path:
    """The folder, in one of `places` or below, in which the pictures of a sample of files are.

    A folder that is called like `annotations`, then one of a usual name, is preferred if it holds at least half as many
    of them as the best one; then the one with most pictures that are called as the files say. Raises `UserError` where
    none has any, or two have as many.
    """
    for place in dict.fromkeys(places):
        scores = _scores(place, wanted)
        best = max(scores.values())
        if not best[1]:
            continue
        order = [fold(annotations.name), *USUAL]
        usual = [f for f in scores if fold(f.name) in order and 2 * scores[f][1] >= best[1]]
        if usual:
            return min(usual, key=lambda f: (order.index(fold(f.name)) > 0, -scores[f][1], order.index(fold(f.name))))
        tied = [f for f, score in scores.items() if score == best]
        deepest = [f for f in tied if not any(f in other.parents for other in tied)]
        if len(deepest) == 1:
            return deepest[0]
        listed = "".join(f"\n    {folder}" for folder in deepest)
        raise UserError(f"{annotations}: its pictures could be in{listed}", "Say which with `--train-images FOLDER`.")
    raise UserError(_none_found(annotations, places, wanted), "Name their folder with `--train-images FOLDER`.")


def _scores(place: Path, wanted: Sequence[Wanted]) -> dict[Path, tuple[int, int]]:
    """For each folder from `place` on: how many pictures are in it, or below, by written name and by name at all."""
    names = {fold(parts[-1]) for w in wanted for parts in readings(w.written)[:1]}
    stems = {fold(Path(w.stem).name) for w in wanted} | {os.path.splitext(name)[0] for name in names}
    found: dict[Path, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for folder in [place, *subfolders(place, DEPTH)]:
        own = [fold(name) for name in os.listdir(folder) if is_image(name)]
        exact = names.intersection(own)
        alike = stems.intersection(os.path.splitext(name)[0] for name in own)
        for holder in (f for f in (folder, *folder.parents) if f == place or place in f.parents):
            found[holder][0].update(exact)
            found[holder][1].update(alike)
    return {folder: (len(exact), len(alike)) for folder, (exact, alike) in found.items()}


def _none_found(annotations: Path, places: Sequence[Path], wanted: Sequence[Wanted]) -> str:
    names = f"{Path(wanted[0].stem).name}.*" if wanted else "pictures"
    if wanted and wanted[0].written:
        names = f"{names} or {wanted[0].written!r}"
    listed = "".join(f"\n    {place}" for place in dict.fromkeys(places))
    return f"{annotations}: its pictures were not found; looked for {names} in these and {DEPTH} levels below{listed}"


class ByName(NamedTuple):
    """The file of each split."""

    files: dict[str, Path]
    parts: bool  # the one file is train and val together


def splits_by_name(data: Path, files: Sequence[Path], what: str) -> ByName | None:
    """Which of a folder's files is which split's, by their names or their folders'; None where there are no files.

    `what` they are called in the `UserError` where the names do not tell.
    """
    if not files:
        return None
    splits = {split: f for f in files if (split := split_named(f.stem, f.parent.name)) is not None}
    if len(files) == 1 and splits.keys() <= {"train"}:
        return ByName({"train": files[0]}, parts=not splits)
    if len(splits) < len(files) or "train" not in splits:
        listed = "".join(f"\n    {f.relative_to(data)}" for f in files)
        name = f"FILE{files[0].suffix.lower()}"
        raise UserError(
            f"{data}: {what} whose names do not say which split each is:{listed}",
            f"Name them: --train {name} --val {name}.",
        )
    return ByName(splits, parts=False)


def files_of_splits(
    files: Mapping[str, Path], given: Mapping[str, Path | None], images_of: Callable[[Path], Path], parts: bool
) -> dict[str, SplitFiles]:
    """Annotation files with the image folders that are given, or that `images_of` finds.

    `parts`: the one file is train and val together.
    """
    found = {}
    for split, file in ((split, file.resolve()) for split, file in files.items()):
        images = given.get(split) or given.get("train") or images_of(file)
        found[split] = SplitFiles(file, (images.resolve(),))
    if not parts:
        return found
    return {part: replace(found["train"], part=part) for part in ("train", "val")}


# The pictures


def pictures_of(wanted: Sequence[Wanted], folder: Path) -> Names:
    """The picture in `folder` of each annotation file, in this order: called like the file, or as the file says.

    In this order, because what stands in a file goes stale when files are renamed. Of two pictures that are called like
    the file but for their suffix the one counts that the file names; where it names neither, none is taken.
    """
    index = _Index([path.relative_to(folder).as_posix() for path in list_images(folder)])
    names, unclear = [""] * len(wanted), dict[int, tuple[str, ...]]()
    for place, (stem, written) in enumerate(wanted):
        options = index.of(stem)
        picked = _pick(options, stem, written)
        if picked is None and options:
            unclear[place] = tuple(options)
        names[place] = picked or ("" if written and not options else stem)
    open_places = [place for place, name in enumerate(names) if not name]
    found = real_names([wanted[place].written for place in open_places], folder)
    renamed = {open_places[place]: written for place, written in found.renamed.items()}
    unclear |= {open_places[place]: files for place, files in found.unclear.items()}
    for place, name in zip(open_places, found.names, strict=True):
        options = [] if name in index or place in renamed or place in unclear else index.of(os.path.splitext(name)[0])
        names[place] = options[0] if len(options) == 1 else name
    return Names(tuple(names), renamed, unclear)


class _Index:
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
        """Those in the same sub-folder, else those anywhere."""
        parts = next(iter(readings(stem)), ("",))
        return self.by_path.get(fold("/".join(parts))) or self.by_stem.get(fold(parts[-1])) or []


def _pick(options: Sequence[str], stem: str, written: str) -> str | None:
    """The one of several that the file names, or that has the very letters."""
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
