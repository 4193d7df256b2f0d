"""The doctor checks the classes:
within a split, and whether the other splits mean the same as training.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from detrellis.data.findings import Finding, finding
from detrellis.data.records import RawDataset

NAMED = 12  # classes that a finding names
Categories = Sequence[tuple[int, str]]  # (id, name)


def check_classes(raws: Mapping[str, RawDataset]) -> list[Finding]:
    """Everything about categories; `raws` by split, training among them or not."""
    findings = [f for raw in raws.values() for f in (*_same_names(raw), *_similar_names(raw))]
    train = raws.get("train")
    if train is None:
        return findings
    others = [raw for split, raw in raws.items() if split != "train"]
    findings += _never_seen(train, others)
    for raw in others:
        findings += disagreements(raw, train.categories)
    return findings


def _box_counts(raw: RawDataset) -> dict[int, int]:
    """Boxes by category id, without crowd regions, on which nothing is trained."""
    ids, counts = np.unique(raw.box_categories[~raw.crowd], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def _same_names(raw: RawDataset) -> Iterator[Finding]:
    times = Counter(name for _, name in raw.categories)
    for name in (name for name, count in times.items() if count > 1):
        ids = [i for i, n in raw.categories if n == name]
        what = f"{len(ids)} categories are called {name!r}: ids {', '.join(map(str, ids))}"
        yield finding("duplicate-class-name", raw.split, raw.source, what, id=ids[0])


def _similar_names(raw: RawDataset) -> Iterator[Finding]:
    """Names that are the same but for case and spaces:
    a slip in labelling, and two classes for the detector.
    """
    counts = _box_counts(raw)
    by_plain_name: dict[str, list[tuple[int, str]]] = {}
    for category, name in raw.categories:
        by_plain_name.setdefault(_plain(name), []).append((category, name))
    for similar in by_plain_name.values():
        if len({name for _, name in similar}) > 1:
            listed = " and ".join(
                f"{name!r} (id {i}, {counts.get(i, 0)} boxes)" for i, name in similar
            )
            what = (
                f"classes that differ only in case, spaces or letters that are not seen: {listed}"
            )
            yield finding("similar-class-names", raw.split, raw.source, what, id=similar[0][0])


def _never_seen(train: RawDataset, others: list[RawDataset]) -> Iterator[Finding]:
    """Classes without a box in training:
    those that val has are one finding, which names them, the others another.
    """
    in_train = _box_counts(train)
    in_val = next((_box_counts(raw) for raw in others if raw.split == "val"), {})
    only_val, never = dict[int, str](), dict[int, str]()
    for category, name in train.categories:
        if category not in in_train and category in in_val:
            only_val[category] = f"{name!r} (id {category}; val has {in_val[category]})"
        elif category not in in_train:
            never[category] = f"{name!r} (id {category})"
    for code, classes in (("class-only-in-val", only_val), ("class-never-seen", never)):
        if classes:
            noun = "class has" if len(classes) == 1 else "classes have"
            more = f" and {len(classes) - NAMED} more" if len(classes) > NAMED else ""
            what = (
                f"{len(classes)} {noun} no box in train: "
                f"{', '.join(list(classes.values())[:NAMED])}{more}"
            )
            one = next(iter(classes)) if len(classes) == 1 else None
            yield finding(code, "train", train.source, what, id=one, count=len(classes))


def disagreements(raw: RawDataset, train: Categories) -> Iterator[Finding]:
    """Categories of `raw` that mean something else in training, or nothing."""
    train_names, counts = dict(train), _box_counts(raw)
    train_ids = {name: i for i, name in reversed(train)}
    for category, name in raw.categories:
        boxes = counts.get(category, 0)
        if train_names.get(category) == name or (category not in train_names and not boxes):
            continue
        if category not in train_names and name not in train_ids:
            what = f"class {name!r} (category {category}, {boxes} boxes) is not in train"
            yield finding("unknown-class", raw.split, raw.source, what, id=category, count=boxes)
            continue
        in_train = (
            f"is {train_names[category]!r} in train"
            if category in train_names
            else "is not in train"
        )
        train_id = f"; there {name!r} is {train_ids[name]}" if name in train_ids else ""
        what = f"category {category} is {name!r} here and {in_train}{train_id} ({boxes} boxes)"
        yield finding(
            "class-mismatch", raw.split, raw.source, what, id=category, count=max(boxes, 1)
        )


def align_classes(raw: RawDataset, train: Categories) -> tuple[RawDataset, dict[str, int]]:
    """`raw` with training's categories, and how many boxes changed, by code.

    A category that training lists under the same id and name stays; otherwise the name decides, and
    the boxes of a name that training does not list are left out.
    """
    if dict(raw.categories) == dict(train):
        return raw, {}
    # Which of training's ids each category means.
    train_names = dict(train)
    ids_by_name = {_plain(name): i for i, name in reversed(train)}
    train_id = {}
    for category, name in raw.categories:
        if category in train_names and _plain(train_names[category]) == _plain(name):
            train_id[category] = category
        elif _plain(name) in ids_by_name:
            train_id[category] = ids_by_name[_plain(name)]
    # The boxes of these, with training's ids.
    kept = np.isin(raw.box_categories, list(train_id))
    aligned = raw.take(np.ones(len(raw), dtype=np.bool_), kept)
    categories = np.array(
        [train_id[old] for old in aligned.box_categories.tolist()], dtype=np.int64
    )
    dropped = raw.box_categories[~kept]
    mismatched = int(np.isin(dropped, list(train_names)).sum())
    counts = {
        "class-mismatch": mismatched + int((categories != aligned.box_categories).sum()),
        "unknown-class": len(dropped) - mismatched,
    }
    aligned = replace(aligned, box_categories=categories, categories=tuple(train))
    return aligned, {code: count for code, count in counts.items() if count}


def _plain(name: str) -> str:
    """The same for names that look the same but for case and spaces:
    some letters are not seen at all.
    """
    letters = unicodedata.normalize("NFKC", name)
    visible = "".join(letter for letter in letters if unicodedata.category(letter) != "Cf")
    return " ".join(visible.split()).casefold()
