"""The doctor looks at the classes: within a split, and whether the other splits mean the same as training."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.records import RawDataset

NAMED = 12  # classes that a finding names
Categories = Sequence[tuple[int, str]]  # (id, name)


def check_classes(raws: Mapping[str, RawDataset]) -> list[Finding]:
    """Everything about categories; `raws` by split, training among them or not."""
    found = [f for raw in raws.values() for f in (*_same_names(raw), *_similar_names(raw))]
    train = raws.get("train")
    if train is None:
        return found
    others = [raw for split, raw in raws.items() if split != "train"]
    found += _never_seen(train, others)
    for raw in others:
        found += disagreements(raw, train.categories)
    return found


def _used(raw: RawDataset) -> dict[int, int]:
    """Boxes per category id, crowd regions left out: they teach nothing."""
    ids, counts = np.unique(raw.box_categories[~raw.crowd], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def _same_names(raw: RawDataset) -> Iterator[Finding]:
    times = Counter(name for _, name in raw.categories)
    for name in (name for name, count in times.items() if count > 1):
        ids = [i for i, n in raw.categories if n == name]
        what = f"{len(ids)} categories are called {name!r}: ids {', '.join(map(str, ids))}"
        yield finding("duplicate-class-name", raw.split, raw.source, what, id=ids[0])


def _similar_names(raw: RawDataset) -> Iterator[Finding]:
    """Names that are the same but for case and spaces: a slip in labelling, and two classes for the detector."""
    used = _used(raw)
    alike: dict[str, list[tuple[int, str]]] = {}
    for own, name in raw.categories:
        alike.setdefault(_plain(name), []).append((own, name))
    for those in alike.values():
        if len({name for _, name in those}) > 1:
            listed = " and ".join(f"{name!r} (id {own}, {used.get(own, 0)} boxes)" for own, name in those)
            what = f"classes that differ only in case, spaces or letters that are not seen: {listed}"
            yield finding("similar-class-names", raw.split, raw.source, what, id=those[0][0])


def _never_seen(train: RawDataset, others: list[RawDataset]) -> Iterator[Finding]:
    """All classes of one kind are one finding, which names them."""
    used = _used(train)
    unseen = [(own, name) for own, name in train.categories if own not in used]
    in_val = next((_used(raw) for raw in others if raw.split == "val"), {})
    only = {own: f"{name!r} (id {own}; val has {in_val[own]})" for own, name in unseen if own in in_val}
    never = {own: f"{name!r} (id {own})" for own, name in unseen if own not in in_val}
    for code, classes in (("class-only-in-val", only), ("class-never-seen", never)):
        if classes:
            noun = "class has" if len(classes) == 1 else "classes have"
            more = f" and {len(classes) - NAMED} more" if len(classes) > NAMED else ""
            what = f"{len(classes)} {noun} no box in train: {', '.join(list(classes.values())[:NAMED])}{more}"
            one = next(iter(classes)) if len(classes) == 1 else None
            yield finding(code, "train", train.source, what, id=one, count=len(classes))


def disagreements(raw: RawDataset, train: Categories) -> Iterator[Finding]:
    """Categories of `raw` that mean something else in training, or nothing."""
    names, used = dict(train), _used(raw)
    ids = {name: i for i, name in reversed(train)}
    for own, name in raw.categories:
        boxes = used.get(own, 0)
        if names.get(own) == name or (own not in names and not boxes):
            continue
        meant = f"; there {name!r} is {ids[name]}" if name in ids else ""
        if own in names or meant:
            is_there = f"is {names[own]!r} in train" if own in names else "is not in train"
            what = f"category {own} is {name!r} here and {is_there}{meant} ({boxes} boxes)"
            yield finding("class-mismatch", raw.split, raw.source, what, id=own, count=max(boxes, 1))
        else:
            what = f"class {name!r} (category {own}, {boxes} boxes) is not in train"
            yield finding("unknown-class", raw.split, raw.source, what, id=own, count=boxes)


def align_classes(raw: RawDataset, train: Categories) -> tuple[RawDataset, dict[str, int]]:
    """`raw` with training's categories, and how many boxes changed.

    A category that training lists under the same id and name stays; otherwise the name decides, and the boxes of a
    name that training does not list are left out.
    """
    if dict(raw.categories) == dict(train):
        return raw, {}
    ids = {_plain(name): i for i, name in reversed(train)}
    meant = {own: ids.get(_plain(name)) for own, name in raw.categories}
    listed = dict(train)
    meant |= {own: own for own, name in raw.categories if own in listed and _plain(listed[own]) == _plain(name)}
    known = {own: to for own, to in meant.items() if to is not None}
    kept = np.isin(raw.box_categories, list(known))
    aligned = raw.take(np.ones(len(raw), dtype=np.bool_), kept)
    olds = aligned.box_categories
    news = np.array([known[old] for old in olds.tolist()], dtype=np.int64)
    lost = raw.box_categories[~kept]
    renamed = int(np.isin(lost, list(listed)).sum())
    counts = {"class-mismatch": renamed + int((news != olds).sum()), "unknown-class": len(lost) - renamed}
    aligned = replace(aligned, box_categories=news, categories=tuple(train))
    return aligned, {code: count for code, count in counts.items() if count}


def _plain(name: str) -> str:
    """The same for names that look the same but for case and spaces: some letters are not seen at all."""
    seen = "".join(letter for letter in unicodedata.normalize("NFKC", name) if unicodedata.category(letter) != "Cf")
    return " ".join(seen.split()).casefold()
