"""H-DETR's hybrid matching (Jia et al., CVPR 2023): more queries in a branch of their own, several for each target.

The decoder also gets a second block of queries, which does not see the first. There every target is matched to k of
them in every layer, so that many more queries learn from each image; the first block learns, one-to-one, to do without
duplicates. Two-stage detectors take the second block's boxes from the proposals ranked after the first's.

| deviation from the released code | why |
| --- | --- |
| a batch without boxes counts as one box, as everywhere else | the same |
| with the Align Loss (Align-DETR, table 2) each target's candidates are ranked | unpublished; see `Align` |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from detrellis.matching import Candidates, Hungarian
from detrellis.nn.queries import QuerySource
from detrellis.schemes.base import Extension, QueryBlock, Step, TrainingScheme
from detrellis.supervision import Supervision


class Hybrid(TrainingScheme):
    """One more block of `queries`, `k` of them for each target, its loss times `weight` (the paper's lambda).

    `source` is the detector's module of queries. `divisor`: sums are divided by all copies of the boxes, as if each
    were a target, or by the boxes.
    """

    name = "hybrid"

    def __init__(
        self,
        source: QuerySource,
        *,
        k: int = 6,
        queries: int = 1500,
        weight: float = 1.0,
        divisor: Literal["copies", "boxes"] = "copies",
    ) -> None:
        super().__init__()
        self.queries, self.k, self.weight, self.divisor = queries, k, weight, divisor
        self.table = source.fresh(queries)

    @property
    def extra_queries(self) -> int:
        """The second block."""
        return self.queries

    def extend(self, step: Step) -> Extension:
        """The second block, or none where the proposals do not suffice for one."""
        boxes = None
        if step.proposals is not None:
            own = step.proposals.best.shape[1]
            next_best = step.proposals.ranked(own, own + self.queries)
            if next_best.shape[1] == 0:
                return Extension([])
            boxes = step.detector.queries.proposed(step.proposals, next_best)
        queries = step.detector.queries.extra(self.table, step.memory, boxes)
        supervision, normaliser = self.supervision_of(step.supervision), self.normaliser(step.mean_boxes)
        block = QueryBlock("hybrid", queries, supervision, weight=self.weight, normaliser=normaliser)
        return Extension([block])

    def supervision_of(self, main: Supervision) -> Supervision:
        """The main block's with `k` queries for each target in every layer."""
        assert isinstance(main.assign, Hungarian)
        several = replace(main.assign, candidates=Candidates(self.k, self.k, self.k, positive_fraction=None))
        return replace(main, assign=several)

    def normaliser(self, mean_boxes: Tensor) -> Tensor:
        """What the second block's sums are divided by."""
        return (mean_boxes * (self.k if self.divisor == "copies" else 1)).clamp(min=1)
