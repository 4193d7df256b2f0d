"""What branches see of a step, and what they report: in pixels of the network's input."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.set_loss import ABSENT
from detrellis.types import Targets, on_device

Ints = NDArray[np.int64]


class Scene(NamedTuple):
    """One step as branches see it."""

    maps: tuple[Tensor, ...]  # (B, D, H, W) of each level, finest first
    strides: tuple[int, ...]
    # (B, 2) height and width of the images without padding; floats, as precise as the boxes
    sizes: Tensor
    labels: tuple[Tensor, ...]  # of each image, (n,)
    boxes: tuple[Tensor, ...]  # of each image, (n, 4) xyxy
    masks: tuple[Tensor, ...] | None = None  # of each image, (n, M, M) within the boxes
    columns: Tensor | None = None  # (C,) bool, classes whose losses count; None: all

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each level."""
        return tuple((int(m.shape[-2]), int(m.shape[-1])) for m in self.maps)

    def counted(self, logits: Tensor) -> Tensor:
        """`logits (..., C)` of the classes, or `(..., C + 1)` with "no object", with those of
        classes that do not count so low that they cost nothing."""
        if self.columns is None:
            return logits
        columns = F.pad(self.columns, (0, logits.shape[-1] - len(self.columns)), value=True)
        return logits.masked_fill(~columns, ABSENT)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each image among the batch's targets."""
        return tuple(itertools.accumulate((len(b) for b in self.boxes[:-1]), initial=0))

    def padded(self) -> tuple[Tensor, Tensor]:
        """The targets' boxes `(B, T, 4)`, with zeros behind those of an image that has fewer than
        others, and which of them are there, `(B, T)` bool. `T` is at least 1."""
        counts = [len(b) for b in self.boxes]
        own = [np.arange(n) + first for n, first in zip(counts, self.offsets, strict=True)]
        table, present = below_each_other(own, max(1, *counts))
        # What is not there is read from a row of zeros, behind all others.
        rows = np.stack([np.where(present, table, sum(counts)), present])
        index, there = on_device(rows, self.boxes[0].device).unbind()
        return F.pad(torch.cat(self.boxes), (0, 0, 0, 1))[index], there.bool()


class BranchAssignment(NamedTuple):
    """What a branch assigned in each image of a batch: where positive queries come from.

    `A` anchors or regions, in order of their cells; several may share a cell's features.
    """

    boxes: Tensor  # (B, A, 4) xyxy, constant
    owner: Tensor  # (B, A) row of the image's targets, or BACKGROUND, or IGNORED
    features: Tensor  # (B, F, D), A a multiple of F
    logits: Tensor  # (B, A, C) of the classes; softmax has one more, "no object"


class Predictions(NamedTuple):
    """A branch's own detections in one image, best first."""

    scores: Tensor  # (K,)
    labels: Tensor  # (K,)
    boxes: Tensor  # (K, 4) xyxy in pixels of the network's input


# (indices (n,), k) to at most k of them, in order; on the host.
Draw = Callable[[Ints, int], Ints]


def random_draw(generator: torch.Generator) -> Draw:
    """Draws without repetition, on the host: the same on every device.

    By numpy, which draws few of many without a permutation of all: background has 10,000s.
    """
    seed = torch.randint(2**62, (1,), generator=generator).numpy()
    random = np.random.Generator(np.random.PCG64(seed))

    def draw(indices: Ints, k: int) -> Ints:
        if len(indices) <= k:
            return indices
        return indices[np.sort(random.choice(len(indices), k, replace=False, shuffle=False))]

    return draw


def below_each_other(rows: Sequence[Ints], columns: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Numbers of each image in a table `(B, columns)` with zeros behind them, and which of it they
    fill."""
    there = np.arange(columns) < np.array([len(r) for r in rows])[:, None]
    table = np.zeros(there.shape, dtype=np.int64)
    table[there] = np.concatenate(rows)
    return table, there


def make_scene(
    maps: tuple[Tensor, ...],
    strides: tuple[int, ...],
    sizes: Tensor,
    targets: Targets,
    columns: Tensor | None = None,
) -> Scene:
    """The scene of normalised targets. Precision is theirs, whatever the maps have."""
    sizes = sizes.to(targets.boxes)
    pixels = cxcywh_to_xyxy(targets.boxes) * sizes.flip(-1).repeat(1, 2)[targets.image]
    counts = list(targets.sizes)
    masks = None if targets.masks is None else targets.masks.split(counts)
    return Scene(
        maps, strides, sizes, targets.labels.split(counts), pixels.split(counts), masks, columns
    )
