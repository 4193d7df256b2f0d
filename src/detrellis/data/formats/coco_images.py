"""The folder that a COCO file's `file_name`s are relative to:
the one where the listed files really are.

The usual places around the file come first, and the first of them that has all is taken. Where only
other folders have them, and several do, their names decide: one that says drawn, depth or mask
loses, one of the same split or one that says pictures wins, copies of the same files are all right.
Otherwise nothing is guessed.
"""

from __future__ import annotations

import filecmp
import itertools
import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detrellis.data.decode import absence
from detrellis.data.files import subfolders, unread_twin
from detrellis.data.formats.coco import ROOT_KEY, base_of, load_json
from detrellis.data.formats.coco_rows import file_name_of
from detrellis.data.formats.lookup import (
    SPLIT_WORDS,
    child,
    fold,
    lookup_keys,
    readings,
    real_names,
)
from detrellis.data.formats.pictures import listed
from detrellis.errors import UserError

SAMPLE = 24  # file names that decide
MAX_SHOWN = 20  # folders that a message names
PICTURES = re.compile(
    r"images?|imgs?|jpegimages|jpe?gs?|png|pictures?|pics|photos?|rgb|colou?r|frames|originals?|data"
)
DRAWN = re.compile(
    r"annotat\w*|drawn|depth|masks?|label\w*|seg\w*|semantic|instances?|vis|visual\w*|previews?|thumb\w*|overlays?|"
    r"debug|pred\w*|results?|outputs?|heatmaps?|edges|flow|normals|gt|box(es)?|bbox(es)?|plots?|backup"
)
REMEDY = (
    "Name the folder that the `file_name`s are relative to with `--train-images` or `--val-images`."
)


class ImageFolder(NamedTuple):
    """A folder, and why it was taken where others would have done; "" where there was no choice."""

    folder: Path
    why: str = ""


class FolderRank(NamedTuple):
    """What a folder's name says for it; the larger, the better."""

    plain: bool  # nothing of drawn, depth or mask
    split: int  # the annotation file's split 1, none 0, another one -1
    pictures: bool


def find_images(file: Path, folders: Sequence[Path] = ()) -> ImageFolder:
    """The folder of the images that `file` lists;
    `folders` are looked at before the usual places near it.

    Raises `UserError` with all that were looked at, or with those between which nothing decides.
    """
    names, written_down = sample_names(file)
    if not names:
        return ImageFolder(file.parent)  # no images, or no COCO file: reading it will say which
    # A place that is named or usual, and has all of them.
    expected = list(dict.fromkeys([*written_down, *folders, *_usual(file)]))
    for place in expected:
        if all(os.path.isfile(place / name) for name in names):
            return ImageFolder(place)
    # Any place, by the strictest way to read the names that has any of them anywhere.
    places = list(dict.fromkeys([*expected, *subfolders(base_of(file), depth=3)]))
    for count_in in (_count_exact, _count_without_backslashes, _count_tails, _count_alike):
        counts = {place: count_in(place, names) for place in places}
        if best := max(counts.values()):
            chosen = _prefer([place for place in places if counts[place] == best], names, file)
            return _higher(chosen, names, base_of(file)) if best < len(names) else chosen
    looked = f"looked for '{names[0]}' in{_some(places)}"
    raise UserError(
        f"{file}: its images were not found; {looked}{_unread(places, names[0])}", REMEDY
    )


def _unread(places: Sequence[Path], name: str) -> str:
    for place in places:
        if twin := unread_twin(place / name):
            return f"\nThere is {place / twin}, but images of this suffix are not read."
    return ""


def _count_exact(folder: Path, names: Sequence[str]) -> int:
    """How many of the names the folder holds as written."""
    return sum(os.path.isfile(folder / name) for name in names)


def _count_without_backslashes(folder: Path, names: Sequence[str]) -> int:
    """How many of the names it holds, backslashes and the like read as folders:
    two may have files of one name.
    """
    return sum(
        os.path.isfile(folder.joinpath(*parts)) for name in names for parts in readings(name)[:1]
    )


def _count_tails(folder: Path, names: Sequence[str]) -> int:
    """How many it holds without the first folders of their names:
    `images/v1/patch8/x.jpg` as `patch8/x.jpg`.
    """
    tails = [
        [parts[start:] for parts in readings(name)[:1] for start in range(1, len(parts) - 1)]
        for name in names
    ]
    return sum(any(folder.joinpath(*tail).is_file() for tail in of_name) for of_name in tails)


def _count_alike(folder: Path, names: Sequence[str]) -> int:
    """How many of the names the folder holds in other letters,
    or behind the path of another machine.
    """
    try:
        entries = {key for entry in os.listdir(folder) for key in lookup_keys(entry)}
    except OSError:
        return 0
    return sum(any(fold(parts[-1]) in entries for parts in readings(name)) for name in names)


def _higher(chosen: ImageFolder, names: Sequence[str], base: Path) -> ImageFolder:
    """The folder above, where that holds the images that this one lacks."""
    for folder in (chosen.folder, *chosen.folder.parents):
        resolved = real_names(names, folder)
        if all(os.path.isfile(folder / name) for name in resolved.names):
            return ImageFolder(folder, chosen.why if folder == chosen.folder else "")
        if folder == base:
            break
    return chosen


def _prefer(places: list[Path], names: Sequence[str], file: Path) -> ImageFolder:
    """The place whose name ranks best, or the first of several copies."""
    ranks = {place: _rank(place, file) for place in places}
    best = [place for place in places if ranks[place] == max(ranks.values())]
    chosen = best[0]
    if len(best) > 1 and not all(_copies(chosen, other, names) for other in best[1:]):
        raise UserError(f"{file}: its images are in more than one folder:{_some(best)}", REMEDY)
    if len(places) == 1:
        return ImageFolder(chosen)
    why = "it holds the same files" if len(best) == len(places) else _reason(ranks, chosen)
    others = ", ".join(_shown(place, file) for place in places if place != chosen)
    shown = _shown(chosen, file)
    return ImageFolder(
        chosen, f"images of the same names are in {others} too; {shown} is read: {why}"
    )


def _rank(place: Path, file: Path) -> FolderRank:
    words = re.findall("[a-z]+", _shown(place, file).lower())
    split = _split_of(words)
    wanted = _split_of(re.findall("[a-z]+", f"{file.parent.name} {file.stem}".lower()))
    agrees = 0 if split is None or wanted is None else 1 if split == wanted else -1
    return FolderRank(
        not any(map(DRAWN.fullmatch, words)), agrees, any(map(PICTURES.fullmatch, words))
    )


def _split_of(words: Sequence[str]) -> str | None:
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)


def _reason(ranks: dict[Path, FolderRank], chosen: Path) -> str:
    best = ranks[chosen]
    next_best = max(rank for rank in ranks.values() if rank != best)
    if best.plain != next_best.plain:
        return "the other's name says that it is drawn, depth, masks or the like"
    return "its name says the split" if best.split != next_best.split else "its name says pictures"


def _copies(one: Path, other: Path, names: Sequence[str]) -> bool:
    """Whether what the names mean in the two folders has the same bytes."""
    pairs = zip(real_names(names, one).names, real_names(names, other).names, strict=True)
    files = [(one / a, other / b) for a, b in pairs if os.path.isfile(one / a)]
    try:
        return bool(files) and all(filecmp.cmp(a, b, shallow=False) for a, b in files)
    except OSError:
        return False


def _shown(place: Path, file: Path) -> str:
    base = base_of(file)
    return place.relative_to(base).as_posix() if place.is_relative_to(base) else str(place)


def _some(places: Iterable[Path]) -> str:
    """The existing folders among the places as lines of a message,
    the first `MAX_SHOWN` of them.
    """
    folders = [place for place in places if place.is_dir()]
    more = f"\n    and {len(folders) - MAX_SHOWN} more folders" if len(folders) > MAX_SHOWN else ""
    return listed(folders[:MAX_SHOWN]) + more


def sample_names(file: Path) -> tuple[list[str], list[Path]]:
    """A few `file_name`s and the image folder that `fix` wrote down,
    without parsing the file (COCO's has 450 MB).
    """
    if absence(file):
        return [], []  # reading it will say so
    try:
        with file.open("rb") as stream:
            # Closed when the last match is gone
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if b"\0" in data[:4]:
            return _parsed(file)
        names = _texts(re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', data))
        if not _named(data):
            urls = _texts(re.finditer(rb'"coco_url"\s*:\s*("(?:[^"\\]|\\.)*")', data))
            names = ("/".join(url.split("/")[-2:]) for url in urls)
        roots = _texts(
            re.finditer(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % ROOT_KEY.encode(), data[:4096])
        )
        return list(itertools.islice((name for name in names if name), SAMPLE)), [
            Path(text) for text in roots
        ]
    except (OSError, ValueError):
        return [], []  # empty: reading it will say so


def _named(data: mmap.mmap) -> bool:
    """Whether a file has `file_name`s at all; LVIS's have URLs alone."""
    return data.find(b'"file_name"') >= 0


def _parsed(file: Path) -> tuple[list[str], list[Path]]:
    """The same of UTF-16, which cannot be searched byte by byte."""
    try:
        rows = load_json(file).get("images")
    except UserError:
        return [], []  # reading it will say so
    names = (
        [file_name_of(row) for row in rows if isinstance(row, dict)]
        if isinstance(rows, list)
        else []
    )
    return [name for name in names if isinstance(name, str) and name][:SAMPLE], []


def _texts(matches: Iterable[re.Match[bytes]]) -> Iterator[str]:
    for match in matches:
        try:
            yield str(json.loads(match.group(1)))
        except ValueError:
            continue


def _usual(file: Path) -> Iterator[Path]:
    """Where images usually are, in any case."""
    word = file.stem.split("_")[-1]  # instances_train2017.json -> train2017
    bases = dict.fromkeys((base_of(file), file.parent))
    below = (("images", word), (word,), (word, "images"), ("images",))
    for base, parts in itertools.product(bases, below):
        if (place := child(base, parts)) is not None:
            yield place
    yield from (file.parent, base_of(file))
