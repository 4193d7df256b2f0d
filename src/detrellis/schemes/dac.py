"""DAC-DETR (Hu et al., NeurIPS 2023):
an auxiliary decoder that gathers queries around objects instead of parting them.

Cross-attention draws several queries to an object, self-attention keeps one and drives the others
away. A second stream of the detector's own queries goes through the same layers without
self-attention, and there each object is learned by all queries that fit it: cross-attention learns
to gather from many more of them. Nothing else is added.

| deviation from the released code | why |
| --- | --- |
| the stream begins as the queries do; there after the first layer's self-attention | as in the paper |
| queries are matched by their own boxes; there by the main stream's | a slip: their losses are of their own |
| denoising queries go through the main stream alone | its noted variant; the paper's text has it so |
"""

from __future__ import annotations

from dataclasses import replace

from detrellis.nn.queries import QuerySource
from detrellis.schemes.bags import one_to_many
from detrellis.schemes.base import Extension, QueryBlock, Step, TrainingScheme
from detrellis.schemes.config import DACConfig


class DAC(TrainingScheme):
    """The detector's queries once more, as a block that passes self-attention by."""

    name = "dac"
    requires = frozenset({"sigmoid_scores", "boxes_alone"})

    def __init__(self, config: DACConfig, source: QuerySource) -> None:
        super().__init__()
        self.config, self.count = config, source.count

    @property
    def extra_queries(self) -> int:
        """As many as the detector has."""
        return self.count

    def extend(self, step: Step) -> Extension:
        """The second stream."""
        supervision = one_to_many(
            step.supervision, self.config.k, self.config.pairs, self.generator
        )
        normaliser = (self.config.divisor * step.mean_boxes).clamp(min=1)
        block = QueryBlock(
            "dac", step.queries, supervision, normaliser=normaliser, repeats=True, attends=False
        )
        return Extension([replace(block, weight=self.config.weight)])
