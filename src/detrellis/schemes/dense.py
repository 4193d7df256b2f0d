"""The dense queries of DDQ-DETR (Zhang et al., CVPR 2023):
more queries than can be distinct, several for each target.

Beside the detector's distinct queries the best proposals of a head of their own, half as many again
and however they overlap, go through the shared decoder in a block that sees itself only. There each
target is matched to k of them, which learn by class and box heads of their own, so that the
detector's heads are not taught duplicates.

| deviation from the released code | why |
| --- | --- |
| the proposal head has its own projection, a copy of the detector's | heads are modules of one piece here |
| sums are divided by the boxes, not by the sum of the targets | as in every other block |
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from detrellis.detector import Detector
from detrellis.losses import quality_focal_loss
from detrellis.matching import Candidates, Hungarian
from detrellis.nn.heads import Heads
from detrellis.pairs import Pairs, SoftTarget
from detrellis.schemes.base import Extension, QueryBlock, Step, TrainingScheme
from detrellis.schemes.config import DenseConfig
from detrellis.schemes.ranks import highest
from detrellis.set_loss import SetLoss
from detrellis.supervision import Supervision


class Dense(TrainingScheme):
    """A block of overlapping queries of a two-stage `detector`,
    with proposal, class and box heads of its own.
    """

    name = "dense"
    requires = frozenset({"proposals", "sigmoid_scores"})

    def __init__(self, config: DenseConfig, detector: Detector) -> None:
        super().__init__()
        source = detector.queries
        self.config = config
        self.queries = config.queries or source.count * 3 // 2
        self.table = source.fresh(self.queries)
        assert isinstance(detector.decoder.heads, Heads)
        self.head, self.heads = copy.deepcopy(source.head), copy.deepcopy(detector.decoder.heads)
        if self.head is not None:
            self.head.proposals, self.head.distinct = self.queries, None

    @property
    def extra_queries(self) -> int:
        """The dense queries."""
        return self.queries

    def start_from(self, detector: Detector) -> None:
        """The heads begin as the detector's, which has been filled with trained weights."""
        assert self.head is not None
        assert detector.queries.head is not None
        self.head.load_state_dict(detector.queries.head.state_dict())
        self.heads.load_state_dict(detector.decoder.heads.state_dict())

    def extend(self, step: Step) -> Extension:
        """The block of dense queries, and what its proposals learn."""
        assert self.head is not None
        proposals = self.head(step.memory)
        block = QueryBlock(
            "dense",
            step.detector.queries.extra(self.table, step.memory, proposals),
            self.supervision_of(step.supervision),
            weight=self.config.weight,
            proposals=self.head.training_output(proposals),
            repeats=True,
            heads=self.heads,
        )
        return Extension([block])

    def supervision_of(self, main: Supervision) -> Supervision:
        """The main block's matching with k queries for each target,
        and a loss of classes and GIoU by their quality.
        """
        assert isinstance(main.assign, Hungarian)
        k = self.config.k
        several = replace(
            main.assign, candidates=Candidates(k, k, k, positive_fraction=1.0), union=False
        )
        assert isinstance(main.rule, SetLoss)
        error = main.rule.iou_error
        rule = SetLoss(
            task_aligned_target, quality_focal_loss, negative_weight=1.0, iou_error=error
        )
        return replace(
            main, assign=several, rule=rule, weights={**main.weights, "class": 1.0, "box": 0.0}
        )


@torch.no_grad()
def task_aligned_target(pairs: Pairs, beta: float = 6.0) -> SoftTarget:
    """`p u^beta` of each positive, scaled so that the best of its candidate set has the set's
    highest IoU `u`, as class target and weight of the box losses (TOOD, Feng et al., ICCV 2021,
    section 3.2)."""
    alignment, owner = pairs.logits.sigmoid() * pairs.iou**beta, pairs.positives.candidate_set
    target = alignment / (highest(alignment, owner) + 1e-7) * highest(pairs.iou, owner)
    return SoftTarget(target, target)
