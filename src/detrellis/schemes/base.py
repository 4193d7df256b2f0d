"""What a training scheme is:
extra query blocks, another supervision, extra losses; nothing of it at inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from detrellis.detector import Detector
from detrellis.nn.heads import Heads
from detrellis.supervision import Supervision, Task
from detrellis.types import Assignment, DecoderOutput, Memory, Proposals, Queries, Segment, Targets


@dataclass(frozen=True)
class Step:
    """One training step, as the schemes see it before the decoder runs."""

    detector: Detector
    memory: Memory
    queries: Queries  # the main block's
    proposals: Proposals | None
    targets: Targets
    supervision: Supervision  # the main block's, as the schemes left it
    mean_boxes: Tensor  # scalar: boxes a process, averaged over all processes; may be below 1
    sizes: Tensor  # (B, 2) height and width of the images without padding, in pixels


@dataclass(frozen=True)
class QueryBlock:
    """Extra queries sent through the shared decoder in the same pass,
    with their own supervision.
    """

    name: str
    queries: Queries
    supervision: Supervision
    copies: int = 1  # equal parts that do not see each other; matched each for itself
    sees: tuple[str, ...] = ()  # blocks whose queries it may also read; main reads nobody
    weight: float = 1.0
    normaliser: Tensor | None = None  # None: copies x boxes, at least 1
    # What its boxes come from, where that learns too: one layer
    proposals: DecoderOutput | None = None
    # (B, N) bool: queries that nobody but themselves reads; None: all are read
    unused: Tensor | None = None
    # Several queries of a copy may learn one target: they are not held to be distinct
    repeats: bool = False
    heads: Heads | None = None  # class and box heads of its own; None: the decoder's
    attends: bool = True  # its queries read each other; else they pass self-attention by
    masks: bool = True  # whether it learns masks, where the detector gives any

    @property
    def segment(self) -> Segment:
        """The block as self-attention sees it."""
        size = self.queries.content.shape[1]
        how = (self.copies, self.sees, self.unused, self.repeats, self.heads, self.attends)
        return Segment(self.name, size, *how)


class Extension(NamedTuple):
    """What a scheme adds to a step."""

    blocks: list[QueryBlock]
    losses: Mapping[str, Tensor] = {}  # weighted


class TrainingScheme(nn.Module):
    """What exists in training only.
    It owns its parameters and its random generator, and leaves the detector alone.

    A scheme has a `name`, and overrides what it needs of the rest: `requires`; the two seams,
    `supervision` and `extend`; and `after`, `extra_queries`, `main_weight`, `start_from` and
    `metrics`.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()  # capabilities that the detector must have

    def __init__(self) -> None:
        super().__init__()
        self.until = 1.0  # the part of the run after which it is left out
        # Draws are made on the host: the same on every device, and no device has to be waited for.
        self.generator = torch.Generator()

    @property
    def extra_queries(self) -> int:
        """Most queries that it adds to an image while training."""
        return 0

    @property
    def main_weight(self) -> float:
        """What the main block's loss is multiplied by,
        where the scheme's blocks stand beside it as its equals.
        """
        return 1.0

    def start_from(self, detector: Detector) -> None:
        """Called once a detector has been filled with trained weights,
        for a scheme that begins as a copy of parts.
        """

    def count_classes(self, images: Tensor) -> None:
        """Told once, before training, how many training images have each class, `(C,)`."""

    def reseed(self, seed: int) -> None:
        """Start the scheme's draws anew;
        called at each step, so that a resumed run draws the same.
        """
        self.generator.manual_seed(seed)

    def progress(self, done: float) -> None:
        """Told at each step which part of the run is done,
        from 0 to below 1, before it is asked for anything else.
        """

    def supervision(self, base: Supervision) -> Supervision:
        """Another supervision for the existing blocks; asked for at each step."""
        return base

    def extend(self, step: Step) -> Extension:
        """Extra query blocks for this step, and extra losses."""
        return Extension([])

    def after(self, step: Step, outputs: Mapping[str, DecoderOutput]) -> list[Task]:
        """What else learns from the decoder's `outputs`, by the blocks' names."""
        return []

    def metrics(
        self, step: Step, blocks: Sequence[QueryBlock], assignments: Mapping[str, Assignment]
    ) -> dict[str, Tensor]:
        """Metrics to log by name, without gradient;
        `blocks` are all of the step, `assignments` theirs by name.
        """
        return {}
