"""Which images make which batch:
deterministic in (seed, epoch), resumable at any batch, the same on every rank.

A key is `(epoch, image index)`: the data set derives the image's augmentation from it, so that
nothing random has a state that a checkpoint would have to save.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from detrellis.errors import UserError

Key = tuple[int, int]  # epoch, image index


def repeat_factors(
    starts: NDArray[np.int64], labels: NDArray[np.int64], classes: int, threshold: float
) -> NDArray[np.float64]:
    """How often each image should be seen in an epoch,
    `(I,)`, at least once on average (LVIS, Gupta et al., 2019).

    Image `i` has the boxes of `labels[starts[i]:starts[i + 1]]`. A class in the fraction f of the
    images asks for `sqrt(threshold / f)`, and an image follows the class that asks for most.
    """
    images = len(starts) - 1
    image, label = _present(starts, labels)
    frequency = np.bincount(label, minlength=classes) / max(images, 1)
    factors = np.ones(images)
    np.maximum.at(factors, image, np.sqrt(threshold / frequency[label]))
    return factors


def images_by_class(
    starts: NDArray[np.int64], labels: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """How many images have each class, `(C,)`; arguments as in `repeat_factors`."""
    counts: NDArray[np.int64] = np.bincount(_present(starts, labels)[1], minlength=classes)
    return counts


def _present(starts: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each image and class that it has, once: `(2, P)`."""
    image = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return np.unique(np.stack([image, labels]), axis=1)


def repeats(factors: NDArray[np.float64], draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """Times that each image stands in an epoch:
    its factor, rounded up where its draw from [0, 1) is less than the remainder."""
    whole = np.floor(factors)
    times: NDArray[np.int64] = (whole + (draws < factors - whole)).astype(np.int64)
    return times


def expected(factors: NDArray[np.float64]) -> int:
    """How many images an epoch has with these factors."""
    return round(float(factors.sum()))


class BatchSampler(Sampler[list[Key]]):
    """Training batches of one rank.

    Every rank gets `len()` batches of `batch_size` per epoch. What does not divide evenly is filled
    by starting over with the epoch's first images; a data set smaller than one global batch is
    repeated. `group_by_aspect` takes the images' `(I, 2)` heights and widths and puts portrait and
    landscape images into separate batches (but for a few mixed ones), which saves padding.
    `factors` `(I,)` are how often each image should be seen in an epoch; an epoch's draws of them
    are cut or filled up to the expected number.

    The position is set, never advanced: call `set_position` before iterating an epoch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        group_by_aspect: NDArray[np.int64] | None = None,
        factors: NDArray[np.float64] | None = None,
    ) -> None:
        if num_images == 0:
            raise UserError(
                "there are no images to train on", "Look at the data set with `detrellis check`."
            )
        assert batch_size > 0
        assert 0 <= rank < world_size
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        landscape = (
            None if group_by_aspect is None else group_by_aspect[:, 1] >= group_by_aspect[:, 0]
        )
        # Of one orientation alone there is nothing to group, and the batches are those without it.
        self.landscape = (
            None if landscape is None or landscape.all() or not landscape.any() else landscape
        )
        self.factors = factors
        seen = num_images if factors is None else expected(factors)
        self.batches = math.ceil(seen / (batch_size * world_size))
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        """Batches per epoch, wherever the position is."""
        return self.batches

    def set_position(self, epoch: int, batch_index: int = 0) -> None:
        """The next iteration yields the batches of `epoch` from `batch_index` on."""
        assert 0 <= batch_index <= self.batches
        self.epoch, self.start = epoch, batch_index

    def __iter__(self) -> Iterator[list[Key]]:
        # All at once, so that moving the position while iterating changes nothing.
        epoch, rows = self.epoch, self._rows(self.epoch)[self.start :]
        return ([(epoch, index) for index in row.tolist()] for row in rows)

    def _rows(self, epoch: int) -> NDArray[np.int64]:
        """(batches, batch_size) image indices of this rank."""
        # [seed, epoch] is hashed into the state, so that neighbouring seeds and epochs are
        # unrelated.
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        if self.factors is None:
            order = random.permutation(self.num_images)
        else:
            times = repeats(self.factors, random.random(self.num_images))
            order = random.permutation(np.repeat(np.arange(self.num_images), times))
        # Repeats from the start
        order = np.resize(order, self.batches * self.world_size * self.batch_size)
        if self.landscape is not None:
            order = self._grouped(order, random)
        return order.reshape(self.batches, self.world_size, self.batch_size)[:, self.rank]

    def _grouped(self, order: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """The same images; as many batches as possible hold one orientation only."""
        assert self.landscape is not None
        sides = self.landscape[order]
        groups = [order[sides], order[~sides]]
        whole = [len(group) // self.batch_size * self.batch_size for group in groups]
        full = [group[:n] for group, n in zip(groups, whole, strict=True)]
        rest = [group[n:] for group, n in zip(groups, whole, strict=True)]
        rows = np.concatenate(full + rest).reshape(-1, self.batch_size)
        return random.permutation(rows, axis=0)


class EvalSampler(Sampler[list[Key]]):
    """Every image exactly once, in batches that the ranks take in turn.

    `shapes` `(I, 2)` are the heights and widths that the detector sees: a batch holds images of one
    shape, so nothing is padded, and what is detected does not depend on the size of the batches.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        shapes: NDArray[np.int64] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert batch_size > 0
        assert 0 <= rank < world_size
        images = np.arange(num_images)
        groups = [images] if shapes is None else _of_one_shape(shapes)
        batches = [
            group[start : start + batch_size]
            for group in groups
            for start in range(0, len(group), batch_size)
        ]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        return ([(0, index) for index in batch.tolist()] for batch in self.batches)


def _of_one_shape(shapes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The images of each shape, in their order."""
    _, group, counts = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
    return np.split(np.argsort(group.reshape(-1), kind="stable"), np.cumsum(counts)[:-1])
