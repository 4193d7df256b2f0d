"""H-DETR's hybrid matching (Jia et al., CVPR 2023):
more queries in a branch of their own, several for each target.

The decoder also gets a second block of queries, which does not see the first. There every target is
matched to k of them in every layer, so that many more queries learn from each image; the first
block learns, one-to-one, to do without duplicates. Two-stage detectors take the second block's
boxes from the proposals ranked after the first's.

| deviation from the released code | why |
| --- | --- |
| a batch without boxes counts as one box, as everywhere else | the same |
| with the Align Loss (Align-DETR, table 2) each target's candidates are ranked | unpublished; see `Align` |
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from detrellis.matching import Candidates, Hungarian
from detrellis.nn.queries import QuerySource
from detrellis.schemes.base import Extension, QueryBlock, Step, TrainingScheme
from detrellis.schemes.config import HybridConfig
from detrellis.supervision import Supervision


class Hybrid(TrainingScheme):
    """One more block of queries, of the kind that the detector's `source` has;
    k of them learn each target.
    """

    name = "hybrid"

    def __init__(self, config: HybridConfig, source: QuerySource) -> None:
        super().__init__()
        self.config = config
        # The paper has 1500 beside 300
        self.queries = config.queries or min(5 * source.count, 1500)
        self.table = source.fresh(self.queries)

    @property
    def extra_queries(self) -> int:
        """The second block."""
        return self.queries

    def extend(self, step: Step) -> Extension:
        """The second block, or none where the proposals do not suffice for one."""
        proposals = None
        if step.proposals is not None:
            proposals = step.detector.queries.further(step.proposals, self.queries)
            if proposals.best.shape[1] == 0:
                return Extension([])
        queries = step.detector.queries.extra(self.table, step.memory, proposals)
        supervision = self.supervision_of(step.supervision)
        normaliser = self.normaliser(step.mean_boxes)
        weight = self.config.weight
        return Extension(
            [
                QueryBlock(
                    "hybrid",
                    queries,
                    supervision,
                    weight=weight,
                    normaliser=normaliser,
                    repeats=True,
                )
            ]
        )

    def supervision_of(self, main: Supervision) -> Supervision:
        """The main block's with k queries for each target in every layer."""
        assert isinstance(main.assign, Hungarian)
        k = self.config.k
        several = replace(
            main.assign, candidates=Candidates(k, k, k, positive_fraction=None), union=False
        )
        return replace(main, assign=several)

    def normaliser(self, mean_boxes: Tensor) -> Tensor:
        """What the second block's sums are divided by."""
        return (mean_boxes * (self.config.k if self.config.divisor == "copies" else 1)).clamp(min=1)
