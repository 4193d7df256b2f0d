"""Which images make which batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detrellis.data.sampler import BatchSampler, EvalSampler, repeat_factors, repeats
from detrellis.errors import UserError

COUNTS = {
    "num_images": st.integers(1, 60),
    "batch_size": st.integers(1, 9),
    "world_size": st.integers(1, 4),
}


def epoch_of(sampler: BatchSampler, epoch: int, start: int = 0) -> list[list[int]]:
    sampler.set_position(epoch, start)
    batches = list(sampler)
    assert all(key[0] == epoch for batch in batches for key in batch)
    return [[index for _, index in batch] for batch in batches]


@given(**COUNTS, seed=st.integers(0, 2**31), grouped=st.booleans())
def test_ranks_partition_an_epoch(
    num_images: int, batch_size: int, world_size: int, seed: int, grouped: bool
) -> None:
    sizes = np.random.default_rng(seed).integers(10, 20, (num_images, 2)) if grouped else None
    ranks = [
        BatchSampler(
            num_images,
            batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            group_by_aspect=sizes,
        )
        for rank in range(world_size)
    ]
    batches = [epoch_of(sampler, 3) for sampler in ranks]
    together = num_images / (batch_size * world_size)
    expected = math.ceil(together)
    assert {len(b) for b in batches} == {expected} == {len(s) for s in ranks}
    assert all(len(batch) == batch_size for rank in batches for batch in rank)
    seen = np.bincount(
        [i for rank in batches for batch in rank for i in batch], minlength=num_images
    )
    assert seen.sum() == expected * batch_size * world_size
    assert seen.max() - seen.min() <= 1, "an image is repeated before all were seen"
    assert seen.min() >= 1


@given(**COUNTS, seed=st.integers(0, 99), data=st.data())
def test_resuming_gives_the_same_batches(
    num_images: int, batch_size: int, world_size: int, seed: int, data: st.DataObject
) -> None:
    sizes = np.random.default_rng(seed).integers(10, 20, (num_images, 2))
    make = [
        BatchSampler(num_images, batch_size, seed=seed, world_size=world_size, group_by_aspect=g)
        for g in (None, sizes)
    ]
    for sampler in make:
        whole, start = epoch_of(sampler, 5), data.draw(st.integers(0, len(sampler)))
        assert epoch_of(sampler, 5, start) == whole[start:]
        assert len(sampler) == len(whole)


def test_epochs_and_seeds_differ() -> None:
    orders = [
        epoch_of(BatchSampler(50, 5, seed=seed), epoch) for seed in range(3) for epoch in range(3)
    ]
    assert len({str(order) for order in orders}) == 9
    assert epoch_of(BatchSampler(50, 5, seed=2), 1) == orders[7]


def test_moving_the_position_leaves_a_running_iteration_alone() -> None:
    sampler = BatchSampler(20, 4)
    whole = epoch_of(sampler, 0)
    sampler.set_position(0)
    running = iter(sampler)
    sampler.set_position(7, 3)
    assert [[i for _, i in batch] for batch in running] == whole


def test_what_does_not_divide_evenly_starts_over() -> None:
    order = [index for batch in epoch_of(BatchSampler(5, 4), 9) for index in batch]
    assert sorted(order[:5]) == list(range(5))
    assert order[5:] == order[:3]


def test_groups_hold_one_orientation() -> None:
    sizes = np.array([(10, 20), (20, 10), (10, 10)] * 20)
    sampler = BatchSampler(60, 4, seed=1, group_by_aspect=sizes)
    batches = epoch_of(sampler, 0)
    assert sorted(i for b in batches for i in b) == list(range(60))
    mixed = [b for b in batches if len({bool(sizes[i, 1] >= sizes[i, 0]) for i in b}) > 1]
    assert len(mixed) <= 1
    orientation = [i % 3 == 1 for b in batches for i in b[:1]]
    assert any(orientation[:5]) or any(not o for o in orientation[:5])
    assert orientation != sorted(orientation), "the groups come one after the other"


@given(**COUNTS)
def test_evaluation_sees_every_image_once(
    num_images: int, batch_size: int, world_size: int
) -> None:
    ranks = [
        EvalSampler(num_images, batch_size, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    batches = [list(sampler) for sampler in ranks]
    assert [len(b) for b in batches] == [len(s) for s in ranks]
    assert sorted(i for rank in batches for batch in rank for _, i in batch) == list(
        range(num_images)
    )
    assert all(0 < len(batch) <= batch_size for rank in batches for batch in rank)


def test_no_images() -> None:
    assert list(EvalSampler(0, 4)) == []
    with pytest.raises(UserError, match="no images"):
        BatchSampler(0, 4)


def test_images_of_one_orientation_are_not_regrouped() -> None:
    plain, grouped = (
        BatchSampler(10, 3, seed=4, group_by_aspect=g) for g in (None, np.full((10, 2), 5))
    )
    assert list(plain) == list(grouped)


def test_images_of_rare_classes_are_seen_more_often() -> None:
    """Class 1 is in one of 20 images: with a threshold of 0.2 that one is seen twice an epoch."""
    starts, labels = np.arange(21), np.array([1] + [0] * 19)
    factors = repeat_factors(starts, labels, 2, 0.2)
    assert factors.tolist() == [2.0] + [1.0] * 19
    sampler = BatchSampler(20, 3, seed=0, factors=factors)
    assert len(sampler) == 7
    for epoch in range(3):
        assert (
            np.bincount(np.concatenate(epoch_of(sampler, epoch)), minlength=20).tolist()
            == [2] + [1] * 19
        )


def test_what_a_factor_leaves_over_is_drawn_anew_each_epoch() -> None:
    factors = np.full(40, 1.25)
    sampler = BatchSampler(40, 5, seed=3, factors=factors)
    assert len(sampler) == 10
    seen = [
        np.bincount(np.concatenate(epoch_of(sampler, epoch)), minlength=40) for epoch in range(30)
    ]
    assert all(times.sum() == 50 for times in seen)
    assert not np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[1], np.bincount(np.concatenate(epoch_of(sampler, 1)), minlength=40))
    # Each image 30 * 1.25 = 37.5 times; within four standard deviations of 30 draws with
    # probability 1/4.
    assert abs(np.sum(seen, axis=0) - 37.5).max() < 4 * (30 * 0.25 * 0.75) ** 0.5 + 2
    assert epoch_of(sampler, 4, 6) == epoch_of(sampler, 4)[6:]


def test_an_image_without_boxes_is_seen_once() -> None:
    assert repeat_factors(np.array([0, 0, 1]), np.array([0]), 1, 0.9).tolist() == [
        1.0,
        (0.9 / 0.5) ** 0.5,
    ]


def test_a_factors_remainder_is_a_probability() -> None:
    factors, draws = np.array([1.0, 1.3, 1.3, 2.5, 2.5]), np.array([0.0, 0.29, 0.31, 0.49, 0.51])
    assert repeats(factors, draws).tolist() == [1, 2, 1, 3, 2]
