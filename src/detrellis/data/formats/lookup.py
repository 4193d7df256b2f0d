"""Real files for names as annotations wrote them:
on another machine, by another tool, for another file system.

`real_names(names, root, nearby)` is what a reader calls once for a whole split:

    resolved = real_names(names, root, nearby=[data])
    resolved.names                             # relative to `root`, with "/"; what was not found stays as written
    renaming_notes(split, source, resolved)    # findings that say what was found under another name

A name that exists as written is taken without another look, at the cost of listing its folder.
Otherwise these are understood, one after the other: backslashes, `./` and `..`, drive letters; URLs
with their query and `%20`; Label Studio's `images/1/x.jpg`, `?d=folder/x.jpg`, and the eight digits
that it puts before an uploaded `x.jpg`; another Unicode form; another case; no suffix; the absolute
path of another machine, of which the longest tail that exists decides.

Files below `root` are found by their name alone, those below `nearby` only where a folder of the
name agrees too. Two candidates are no answer: nothing is guessed, and `ResolvedNames.unclear` lists
them. Neither is a file that is listed by its own name already, nor one of another split's folder
(`train/7.jpg` is not `val/7.jpg`).

`find_place(text, bases)` does the same for one folder or list, as YOLO's yaml names them.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from detrellis.data.files import hidden, is_image, walk
from detrellis.data.findings import Finding, finding
from detrellis.data.splits import SPLITS

# What Label Studio makes of the name of an uploaded file
UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")
SPLIT_WORDS = {word: split for split, words in SPLITS.items() for word in words}
Parts = tuple[str, ...]


def split_named(*texts: str) -> str | None:
    """The split that the first of the texts speaks of that speaks of one alone:
    `train_labels`, `coco-val-v2`.
    """
    for text in texts:
        words = re.findall("[a-z]+", text.lower())
        splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        if len(splits) == 1:
            return splits.pop()
    return None


@dataclass(frozen=True)
class ResolvedNames:
    """The files that a list of names means."""

    # Relative to the root, "/" between folders; as written where nothing was found
    names: tuple[str, ...]
    # Place in the list -> the name as written, of those found under another one
    renamed: Mapping[int, str]
    # Place -> the files that it could mean, of those not found
    unclear: Mapping[int, tuple[str, ...]]


class Candidate(NamedTuple):
    """A file that a name could mean."""

    path: str  # absolute
    called: str  # the same as names have it: without a suffix where they have none
    parts: Parts  # from the folder that was searched on, the folder's own name first
    near: bool  # found beside the root, not below it


class NameMatch(NamedTuple):
    """The files that fit a name best."""

    files: list[Candidate]  # one: found; several: unclear
    whole: bool  # no folder of the name was passed over


def real_names(names: Sequence[str], root: Path, nearby: Sequence[Path] = ()) -> ResolvedNames:
    """The files below `root`, else below the folders `nearby`, that the names mean;
    see the head of this module.
    """
    absent = _absent(names, root)
    if not absent:
        return ResolvedNames(tuple(names), {}, {})
    # Everything that the absent names could mean, looked up in one index.
    meanings = {place: readings(names[place]) for place in absent}
    index = _index(root, nearby, {fold(parts[-1]) for ways in meanings.values() for parts in ways})
    matches = {place: _match(ways, index) for place, ways in meanings.items()}
    # Files that a name means as a whole; those of which folders were passed over must not be among
    # them.
    taken = {
        os.path.normpath(root / name) for place, name in enumerate(names) if place not in meanings
    }
    taken |= {
        match.files[0].path for match in matches.values() if match.whole and len(match.files) == 1
    }
    in_part = Counter(
        m.files[0].path for m in matches.values() if not m.whole and len(m.files) == 1
    )
    resolved, renamed, unclear = list(names), dict[int, str](), dict[int, tuple[str, ...]]()
    for place, (files, whole) in matches.items():
        if not files:
            continue
        path = files[0].path
        shown = tuple(Path(os.path.relpath(file.path, root)).as_posix() for file in files)
        if len(files) > 1 or (not whole and (path in taken or in_part[path] > 1)):
            unclear[place] = shown
        else:
            resolved[place], renamed[place] = shown[0], names[place]
    return ResolvedNames(tuple(resolved), renamed, unclear)


def renaming_notes(split: str, source: Path, resolved: ResolvedNames) -> tuple[Finding, ...]:
    """The findings `renamed-file` and `unclear-file`,
    each with how many there are and the first.
    """
    notes = []
    if resolved.renamed:
        place, written = next(iter(resolved.renamed.items()))
        count = _images(len(resolved.renamed))
        what = (
            f"{count} listed under other names, the first: '{written}' is {resolved.names[place]}"
        )
        notes.append(finding("renamed-file", split, source, what, count=len(resolved.renamed)))
    if resolved.unclear:
        place, files = next(iter(resolved.unclear.items()))
        options = " or ".join(files[:4]) + (
            f" (or {len(files) - 4} more)" if len(files) > 4 else ""
        )
        taken = "" if len(files) > 1 else ", which another name means too"
        count = _images(len(resolved.unclear))
        what = (
            f"{count} not found for certain, the first: '{resolved.names[place]}' could be "
            f"{options}{taken}"
        )
        notes.append(finding("unclear-file", split, source, what, count=len(resolved.unclear)))
    return tuple(notes)


def find_place(text: str, bases: Sequence[Path]) -> Path | None:
    """The folder or file that `text` means, from one of `bases`:
    as written, or the longest tail that exists there.

    Of a path with folders at least two parts must fit, or all that it has.
    """
    exact = next((base / text for base in bases if os.path.exists(base / text)), None)
    if exact is not None:
        return exact
    tails = [parts[start:] for parts in readings(text) for start in range(max(1, len(parts) - 1))]
    places = (child(base, tail) for tail in tails for base in bases)
    return next((place for place in places if place is not None), None)


def readings(name: str) -> list[Parts]:
    """The parts of the path that a name may mean, the most literal way first; never empty parts."""
    texts = [name]
    if "://" in name:
        texts = [*_of_url(name)]
    elif "?" in name:
        texts += _of_url(name)
    texts += [unquote(text) for text in texts if "%" in text]
    ways = list(dict.fromkeys(parts for text in texts if (parts := _parts(text))))
    uploads = [
        (*parts[:-1], match.group(1)) for parts in ways if (match := UPLOADED.fullmatch(parts[-1]))
    ]
    return ways + uploads


def fold(text: str) -> str:
    """The same for names that differ only in case or Unicode form."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def lookup_keys(name: str) -> tuple[str, ...]:
    """What a file is found by, folded:
    its name, and of an image also the name without its suffix.
    """
    stem = os.path.splitext(name)[0]
    return (fold(name), fold(stem)) if is_image(name) and not is_image(stem) else (fold(name),)


def _of_url(text: str) -> Iterator[str]:
    """The path that a URL names, decoded and as it stands."""
    try:
        url = urlsplit(text)
    except ValueError:
        return
    yield from (path for path in parse_qs(url.query).get("d", ()))  # Label Studio's local files
    path = url.path or url.netloc
    yield unquote(path)
    yield path


def _parts(text: str) -> Parts:
    pieces = [piece.strip() for piece in text.replace("\\", "/").split("/")]
    return tuple(
        piece
        for piece in pieces
        if piece not in ("", ".", "..") and not re.fullmatch("[A-Za-z]:", piece)
    )


def _absent(names: Sequence[str], root: Path) -> list[int]:
    """Places of the names that do not exist as written: each folder is listed once."""
    by_folder: dict[str, list[int]] = defaultdict(list)
    bases = []
    for place, name in enumerate(names):
        folder, _, base = name.rpartition("/")
        by_folder[folder or name[: name.startswith("/")]].append(place)
        bases.append(base)
    absent: list[int] = []
    for folder, places in by_folder.items():
        try:
            existing = set(os.listdir(root / folder))
        except (OSError, ValueError):
            existing = set()
        absent += [place for place in places if bases[place] not in existing]
    return sorted(absent)


def _index(root: Path, nearby: Iterable[Path], wanted: set[str]) -> dict[str, list[Candidate]]:
    """Files by folded name, each once, those below `root` first."""
    index: dict[str, list[Candidate]] = defaultdict(list)
    seen: set[str] = set()
    for folder in dict.fromkeys([root, *nearby]):
        for parent, files in walk(folder):
            fitting = [(name, key) for name in files for key in lookup_keys(name) if key in wanted]
            real = os.path.normpath(parent)
            if not fitting or real in seen:
                continue
            seen.add(real)
            parts = (folder.name, *Path(parent).relative_to(folder).parts)
            for name, key in sorted(fitting):
                called = name if key == fold(name) else os.path.splitext(name)[0]
                paths = os.path.join(real, name), os.path.join(real, called)
                index[key].append(Candidate(*paths, (*parts, name), folder != root))
    return index


def _match(ways: Sequence[Parts], index: Mapping[str, Sequence[Candidate]]) -> NameMatch:
    """The files of the first way to read a name that has any; without files where none has."""
    for parts in ways:
        files = [
            file for file in index.get(fold(parts[-1]), ()) if not _contradict(parts, file.parts)
        ]
        tails = [_tail(parts, file.called) for file in files]
        # Beside the root a name alone says nothing: 7.jpg is another picture in another folder.
        certain = [
            (file, tail)
            for file, tail in zip(files, tails, strict=True)
            if tail > 1 or not file.near
        ]
        if certain:
            return _best(parts, certain)
    return NameMatch([], False)


def _best(parts: Parts, options: Sequence[tuple[Candidate, int]]) -> NameMatch:
    """The longest common tail decides, then being below the root, then the very letters."""
    longest = max(tail for _, tail in options)
    best = [file for file, tail in options if tail == longest]
    best = [file for file in best if not file.near] or best
    if len(best) > 1:
        tail = "/".join(_composed(parts[-longest:]))
        exact = [f for f in best if "/".join(_composed(Path(f.called).parts[-longest:])) == tail]
        best = exact if len(exact) == 1 else best
    return NameMatch(best, longest == len(parts))


def _composed(parts: Parts) -> Iterator[str]:
    return (unicodedata.normalize("NFC", part) for part in parts)


def _tail(parts: Parts, path: str) -> int:
    """How many of the last parts agree with the path's."""
    path_parts = Path(path).parts
    count = 0
    for ours, theirs in zip(reversed(parts), reversed(path_parts), strict=False):
        if fold(ours) != fold(theirs):
            break
        count += 1
    return count


def _contradict(name: Parts, file: Parts) -> bool:
    """Whether the two lie in folders of different splits."""
    a, b = _split_of(name), _split_of(file)
    return a is not None and b is not None and a != b


def _split_of(parts: Parts) -> str | None:
    words = (SPLIT_WORDS.get(part.lower().rstrip("0123456789_-")) for part in reversed(parts[:-1]))
    return next((split for split in words if split is not None), None)


def child(base: Path, parts: Parts) -> Path | None:
    """`base/part/part/...`, in any case and Unicode form where only one entry fits."""
    for part in parts:
        if not os.path.exists(base / part):
            alike = [
                name for name in _entries(base) if fold(name) == fold(part) and not hidden(name)
            ]
            if len(alike) != 1:
                return None
            part = alike[0]
        base = base / part
    return base


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _images(count: int) -> str:
    return "1 image is" if count == 1 else f"{count} images are"
