"""What branches see of a step, and what they report:
in pixels of the network's input, image by image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.set_loss import ABSENT
from detrellis.types import Targets


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


class BranchAssignment(NamedTuple):
    """What a branch assigned in one image: where positive queries come from.

    `A` anchors or regions, in order of their cells; several may share a cell's features.
    """

    boxes: Tensor  # (A, 4) xyxy, constant
    owner: Tensor  # (A,) row of the image's targets, or BACKGROUND, or IGNORED
    features: Tensor  # (F, D), A a multiple of F
    logits: Tensor  # (A, C) of the classes; softmax has one more, "no object"


class Predictions(NamedTuple):
    """A branch's own detections in one image, best first."""

    scores: Tensor  # (K,)
    labels: Tensor  # (K,)
    boxes: Tensor  # (K, 4) xyxy in pixels of the network's input


# (indices (n,), k) to at most k of them, in order.
Draw = Callable[[Tensor, int], Tensor]


def random_draw(generator: torch.Generator) -> Draw:
    """Draws without repetition, on the host: the same on every device."""

    def draw(indices: Tensor, k: int) -> Tensor:
        if len(indices) <= k:
            return indices
        chosen = torch.randperm(len(indices), generator=generator)[:k].sort().values
        return indices[chosen.to(indices.device, non_blocking=True)]

    return draw


def on_host(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Tensors `(n,)` of one type on the host, in one copy: what is looked for in them there needs
    no further wait for the device."""
    ends = np.cumsum([len(t) for t in tensors])
    return np.split(torch.cat(list(tensors)).cpu().numpy(), ends[:-1])


def rows_where(mask: NDArray[np.bool_]) -> Tensor:
    """The rows of `mask (n,)` that are true, in order, on the host."""
    return torch.from_numpy(np.flatnonzero(mask))


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
