"""MS-DETR (Zhao et al., CVPR 2024):
mixed supervision, one-to-one and one-to-many, of the same queries.

In each decoder layer cross-attention comes first (`detector.decoder.cross_first`, a network part).
What the queries have read there goes through a feed-forward block of its own to the same heads, and
is supervised one-to-many; then self-attention tells the queries apart, and the layer's output is
supervised one-to-one as ever. No query is added.

| deviation from the released code | why |
| --- | --- |
| proposals learn as the base's do; in a first version there, by anchors and whatever the class | it is the base's |
| no union of these pairs with the one-to-one pairs | an option there, off |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from detrellis.nn.decoder import Decoder
from detrellis.nn.mlp import FeedForward
from detrellis.schemes.bags import one_to_many
from detrellis.schemes.base import Step, TrainingScheme
from detrellis.schemes.config import MSConfig
from detrellis.supervision import Task
from detrellis.types import DecoderOutput


class MS(TrainingScheme):
    """A feed-forward block for each decoder layer, behind its cross-attention."""

    name = "ms"
    requires = frozenset({"sigmoid_scores", "boxes_alone", "cross_first"})

    def __init__(
        self, config: MSConfig, layers: int, feed_forward: Callable[[], FeedForward]
    ) -> None:
        super().__init__()
        self.config = config
        self.feed_forwards = nn.ModuleList(feed_forward() for _ in range(layers))

    def after(self, step: Step, outputs: Mapping[str, DecoderOutput]) -> list[Task]:
        """What the main queries have read in each layer, supervised one-to-many."""
        between, decoder = outputs["main"].between, step.detector.decoder
        assert between is not None
        assert isinstance(decoder, Decoder)
        supervision = one_to_many(
            step.supervision, self.config.k, self.config.pairs, self.generator
        )
        weights = supervision.weights
        supervision = replace(
            supervision, weights={**weights, "class": self.config.classes * weights["class"]}
        )
        pairs = zip(self.feed_forwards, between.states, strict=True)
        output = decoder.say([block(x) for block, x in pairs], between.references)
        return [
            supervision.task(
                "ms", output, step.targets, step.mean_boxes.clamp(min=1), weight=self.config.weight
            )
        ]
