"""The folder that a COCO file's `file_name`s are relative to: the one where the listed files really are.

The usual places around the file come first, and the first of them that has all is taken. Where only other folders have
them, and several do, their names decide: one that says drawn, depth or mask loses, one of the same split or one that
says pictures wins, copies of the same files are all right. Otherwise nothing is guessed.
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

from detrellis.data.files import subfolders, unread_twin
from detrellis.data.formats.coco import ROOT_KEY, base_of, load_json
from detrellis.data.formats.lookup import SPLIT_WORDS, child, fold, readings, real_names
from detrellis.errors import UserError

SAMPLE = 24  # file names that decide
PICTURES = re.compile(r"images?|imgs?|jpegimages|jpe?gs?|png|pictures?|pics|photos?|rgb|colou?r|frames|originals?|data")
DRAWN = re.compile(
    r"annotat\w*|drawn|depth|masks?|label\w*|seg\w*|semantic|instances?|vis|visual\w*|previews?|thumb\w*|overlays?|"
    r"debug|pred\w*|results?|outputs?|heatmaps?|edges|flow|normals|gt|box(es)?|bbox(es)?|plots?|backup"
)
REMEDY = "Name the folder that the `file_name`s are relative to with `--train-images` or `--val-images`."


class Chosen(NamedTuple):
    """A folder, and why it was taken where others would have done; "" where there was no choice."""

    folder: Path
    why: str = ""


class Merit(NamedTuple):
    """What a folder's name says: the larger, the better."""

    plain: bool  # nothing of drawn, depth or mask
    split: int  # the file's own split 1, none 0, another one -1
    pictures: bool


def find_images(file: Path, folders: Sequence[Path] = ()) -> Chosen:
    """The folder of the images that `file` lists; `folders` are looked at before the usual places near it.

    Raises `UserError` with all that were looked at, or with those between which nothing decides.
    """
    names, written_down = sample_names(file)
    if not names:
        return Chosen(file.parent)  # no images, or no COCO file: reading it will say which
    sure = list(dict.fromkeys([*written_down, *folders, *_usual(file)]))
    complete = next((place for place in sure if all((place / name).is_file() for name in names)), None)
    if complete is not None:
        return Chosen(complete)
    places = list(dict.fromkeys([*sure, *subfolders(base_of(file), depth=3)]))
    for held in (_exactly, _in_slashes, _alike):
        hits = [held(place, names) for place in places]
        if most := max(hits):
            chosen = _prefer([p for p, count in zip(places, hits, strict=True) if count == most], names, file)
            return _higher(chosen, names, base_of(file)) if most < len(names) else chosen
    looked = f"looked for '{names[0]}' in{_listed(places)}"
    raise UserError(f"{file}: its images were not found; {looked}{_unread(places, names[0])}", REMEDY)


def _unread(places: Sequence[Path], name: str) -> str:
    twins = (place / twin for place in places if (twin := unread_twin(place / name)))
    return "".join(f"\nThere is {twin}, but images of this suffix are not read." for twin in list(twins)[:1])


def _exactly(folder: Path, names: Sequence[str]) -> int:
    """How many of the names the folder holds."""
    return sum((folder / name).is_file() for name in names)


def _in_slashes(folder: Path, names: Sequence[str]) -> int:
    """How many of them with backslashes and the like read: two folders may have files of the same names."""
    return sum(folder.joinpath(*parts).is_file() for name in names for parts in readings(name)[:1])


def _alike(folder: Path, names: Sequence[str]) -> int:
    """How many of the names the folder holds in other letters, or behind the path of another machine."""
    try:
        there = {fold(entry) for entry in os.listdir(folder)}
    except OSError:
        return 0
    return sum(any(fold(parts[-1]) in there for parts in readings(name)) for name in names)


def _higher(chosen: Chosen, names: Sequence[str], base: Path) -> Chosen:
    """The folder above, where that holds the images that this one lacks."""
    for folder in (chosen.folder, *chosen.folder.parents):
        found = real_names(names, folder)
        if all((folder / name).is_file() for name in found.names):
            return Chosen(folder, chosen.why if folder == chosen.folder else "")
        if folder == base:
            break
    return chosen


def _prefer(places: list[Path], names: Sequence[str], file: Path) -> Chosen:
    """The one whose name is best, or the first of several copies."""
    merits = {place: _merit(place, file) for place in places}
    best = [place for place in places if merits[place] == max(merits.values())]
    others = ", ".join(_shown(p, file) for p in places if p != best[0])
    if len(best) > 1 and not all(_copies(best[0], other, names) for other in best[1:]):
        raise UserError(f"{file}: its images are in more than one folder:{_listed(best)}", REMEDY)
    if len(places) == 1:
        return Chosen(best[0])
    why = "it holds the same files" if len(best) == len(places) else _reason(merits, best[0])
    return Chosen(best[0], f"images of the same names are in {others} too; {_shown(best[0], file)} is read: {why}")


def _merit(place: Path, file: Path) -> Merit:
    words = re.findall("[a-z]+", _shown(place, file).lower())
    own = _split_of(re.findall("[a-z]+", f"{file.parent.name} {file.stem}".lower()))
    split = _split_of(words)
    agrees = 0 if split is None or own is None else 1 if split == own else -1
    return Merit(not any(map(DRAWN.fullmatch, words)), agrees, any(map(PICTURES.fullmatch, words)))


def _split_of(words: Sequence[str]) -> str | None:
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)


def _reason(merits: dict[Path, Merit], best: Path) -> str:
    own, next_best = merits[best], max(merit for merit in merits.values() if merit != merits[best])
    if own.plain != next_best.plain:
        return "the other's name says that it is drawn, depth, masks or the like"
    return "its name says the split" if own.split != next_best.split else "its name says pictures"


def _copies(one: Path, other: Path, names: Sequence[str]) -> bool:
    """Whether what the names mean in the two folders has the same bytes."""
    pairs = zip(real_names(names, one).names, real_names(names, other).names, strict=True)
    files = [(one / a, other / b) for a, b in pairs if (one / a).is_file()]
    try:
        return bool(files) and all(filecmp.cmp(a, b, shallow=False) for a, b in files)
    except OSError:
        return False


def _shown(place: Path, file: Path) -> str:
    base = base_of(file)
    return place.relative_to(base).as_posix() if place.is_relative_to(base) else str(place)


def _listed(places: Iterable[Path]) -> str:
    there = [place for place in places if place.is_dir()]
    more = f"\n    and {len(there) - 20} more folders" if len(there) > 20 else ""
    return "".join(f"\n    {place}" for place in there[:20]) + more


def sample_names(file: Path) -> tuple[list[str], list[Path]]:
    """A few `file_name`s and the image folder that `fix` wrote down, without parsing the file (COCO's has 450 MB)."""
    try:
        with file.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)  # closed when the last match is gone
        if b"\0" in data[:4]:
            return _parsed(file)
        names = _texts(re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', data))
        roots = _texts(re.finditer(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % ROOT_KEY.encode(), data[:4096]))
        return list(itertools.islice((name for name in names if name), SAMPLE)), [Path(text) for text in roots]
    except (OSError, ValueError):
        return [], []  # missing or empty: reading it will say so


def _parsed(file: Path) -> tuple[list[str], list[Path]]:
    """The same of UTF-16, which cannot be searched byte by byte."""
    try:
        rows = load_json(file).get("images")
    except UserError:
        return [], []  # reading it will say so
    names = [row.get("file_name") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
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
    places = (child(base, parts) for base, parts in itertools.product(bases, below))
    yield from (place for place in places if place is not None)
    yield from (file.parent, base_of(file))
