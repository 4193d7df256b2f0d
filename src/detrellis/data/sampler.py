"""Which images make which batch: deterministic in (seed, epoch), resumable at any batch, the same on every rank.

A key is `(epoch, image index)`: the data set derives the image's augmentation from it, so that nothing random has a
state that a checkpoint would have to save.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from detrellis.errors import UserError

Key = tuple[int, int]  # epoch, image index


class BatchSampler(Sampler[list[Key]]):
    """Training batches of one rank.

    Every rank gets `len()` batches of `batch_size` per epoch. What does not divide evenly is filled by starting over
    with the epoch's first images; a data set smaller than one global batch is repeated. `group_by_aspect` takes the
    images' `(I, 2)` heights and widths and puts portrait and landscape images into separate batches (but for a few
    mixed ones), which saves padding.

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
    ) -> None:
        if num_images == 0:
            raise UserError("there are no images to train on", "Look at the data set with `detrellis check`.")
        assert batch_size > 0
        assert 0 <= rank < world_size
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        landscape = None if group_by_aspect is None else group_by_aspect[:, 1] >= group_by_aspect[:, 0]
        # Of one orientation alone there is nothing to group, and the batches are those without it.
        self.landscape = None if landscape is None or landscape.all() or not landscape.any() else landscape
        self.batches = math.ceil(num_images / (batch_size * world_size))
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
        # [seed, epoch] is hashed into the state, so that neighbouring seeds and epochs are unrelated.
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = random.permutation(self.num_images)
        order = np.resize(order, self.batches * self.world_size * self.batch_size)  # repeats from the start
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
    """Every image exactly once over all ranks, in order; ranks may differ by one image and get fewer batches."""

    def __init__(self, num_images: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        assert batch_size > 0
        assert 0 <= rank < world_size
        self.indices, self.batch_size = range(rank, num_images, world_size), batch_size

    def __len__(self) -> int:
        """Batches of this rank."""
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]
