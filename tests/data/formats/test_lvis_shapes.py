"""The synthetic set in LVIS's form: a long tail, and lists that are true of its pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from benchmarks.lvis_shapes import ABSENT, BINS, NAMES, kinds, searched, write_lvis_shapes

from detrellis.data.layout import resolve
from detrellis.data.records import to_annotations


def test_the_set_is_read_as_lvis_and_its_letters_count_images(tmp_path: Path) -> None:
    letters = write_lvis_shapes(tmp_path / "set", train=60, val=12, side=48)
    assert set(letters) == {"r", "c"}
    assert sum(letters.values()) == len(NAMES)
    source = resolve(tmp_path / "set")
    train, val = (to_annotations(source.load(split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (60, 12)
    assert train.path(0).is_file()
    assert train.federation is not None
    assert val.federation is not None
    assert train.federation.frequency == val.federation.frequency
    owners = np.repeat(train.image_ids, np.diff(train.starts))
    seen = Counter(label for _, label in set(zip(owners, train.labels, strict=True)))
    for label, category in enumerate(train.classes.ids):
        rare = seen[label] <= BINS[0][0]
        assert train.federation.frequency[category] == ("r" if rare else "c")


def test_training_has_a_long_tail_and_validation_none() -> None:
    train, val = kinds(0)
    assert train.shares is not None
    shares = np.sort(train.shares)[::-1]
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(shares[0] / shares[9], 10**1.2)
    assert val.shares is None
    assert kinds(1)[0].shares != train.shares


def test_lists_are_true_of_what_is_drawn() -> None:
    """Absent classes are not there; what is not all marked is marked in part;
    all objects of the other marked classes are.
    """
    random, mask = np.random.default_rng(0), np.ones((1, 1), dtype=np.bool_)
    passed_over = partly = 0
    for _ in range(200):
        objects = [(int(c), mask) for c in random.integers(1, 5, 6)]
        marked, absent, partial = searched(objects, random)
        drawn, found = (Counter(c for c, _ in some) for some in (objects, marked))
        assert len(set(absent)) == ABSENT
        assert not set(absent) & set(drawn)
        assert all(found[c] == drawn[c] - (c in partial) for c in found)
        assert set(partial) <= set(found)
        passed_over += len(drawn) - len(found)
        partly += len(partial)
    assert 100 < passed_over < 250  # of 660, one in four
    assert partly > 50
