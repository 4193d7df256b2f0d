"""Group DETR (Chen et al., ICCV 2023): K groups of queries in training, each matched one-to-one.

Every target is learned by one query of each group: one-to-many over all queries, without the
duplicates, because the groups do not see each other in self-attention and each is matched for
itself. All but the queries is shared. The detector's own queries are the first group; the others
are this scheme's, and gone at inference.

| deviation from the released code | why |
| --- | --- |
| the first group is the main block, the others are one block of K - 1 copies | same output and loss; no square mask |
| DINO and two-stage Deformable DETR: proposals by heads of each group | unspecified in the paper; as in LW-DETR |
| `proposals="split"`: the first group keeps the best, the others share those ranked next | the detector is unchanged |
| a batch without boxes counts as one box in each group, not in all | the groups' loss stays a mean over groups |
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from detrellis.detector import Detector
from detrellis.nn.heads import joined
from detrellis.nn.proposals import ProposalHead, side_by_side
from detrellis.nn.queries import QuerySource, Table
from detrellis.schemes.base import Extension, QueryBlock, Step, TrainingScheme
from detrellis.schemes.config import GroupConfig
from detrellis.schemes.distances import matched_distance, matched_positions, position_distance
from detrellis.types import Assignment, DecoderOutput, Proposals


class Group(TrainingScheme):
    """K groups of queries: the detector's own, and K - 1 more of the kind that its `source` has."""

    name = "group"

    def __init__(self, config: GroupConfig, source: QuerySource) -> None:
        super().__init__()
        # The paper has 11 groups, and 3 of DINO's larger ones.
        self.k = config.k or (11 if source.head is None else 3)
        self.config, self.count = config, source.count
        self.table = source.fresh((self.k - 1) * self.count)
        self._copy_contents(source)
        head = source.head if config.proposals == "heads" else None
        self.heads = nn.ModuleList(sibling(head) for _ in range(self.k - 1) if head is not None)

    @property
    def extra_queries(self) -> int:
        """All groups but the first."""
        return (self.k - 1) * self.count

    @property
    def main_weight(self) -> float:
        """The weight of each group's loss, the first one's too."""
        return 1 / self.k if self.config.reduction == "mean" else 1.0

    def start_from(self, detector: Detector) -> None:
        """The further proposal heads begin as the detector's,
        which has been filled with trained weights.
        """
        self._copy_contents(detector.queries)
        if detector.queries.head is not None:
            for head in self.heads:
                head.load_state_dict(detector.queries.head.state_dict())

    @torch.no_grad()
    def _copy_contents(self, source: QuerySource) -> None:
        if self.config.contents == "copied" and "content" in self.table:
            self.table["content"].copy_(source.get_parameter("content").repeat(self.k - 1, 1))

    def extend(self, step: Step) -> Extension:
        """The further groups, as equal copies."""
        if self.k == 1:
            return Extension([])
        proposals, output = (
            (None, None) if step.proposals is None else self._propose(step, step.proposals)
        )
        further = self.k - 1
        table: Table = self.table
        proposed = self.extra_queries if proposals is None else proposals.best.shape[1]
        if proposed < self.extra_queries:
            # A memory of few tokens: each group's first rows, as the detector takes its first ones.
            rows = {name: value.unflatten(0, (further, -1)) for name, value in table.items()}
            table = {
                name: value[:, : proposed // further].flatten(0, 1) for name, value in rows.items()
            }
        block = QueryBlock(
            "group",
            step.detector.queries.extra(table, step.memory, proposals),
            step.supervision,
            copies=further,
            weight=further * self.main_weight,
            normaliser=further * step.mean_boxes.clamp(min=1),
            proposals=output,
        )
        return Extension([block])

    def _propose(self, step: Step, first: Proposals) -> tuple[Proposals, DecoderOutput | None]:
        """What all further groups select, one after the other,
        and what the loss sees of the heads that proposed it.

        `first` are the first group's proposals.
        """
        further, count = self.k - 1, first.best.shape[1]
        shared = side_by_side([first] * further)
        if self.config.proposals == "shared":
            return shared, None
        if self.config.proposals == "split":
            split = step.detector.queries.further(first, count, further)
            # A memory of few tokens: they are shared
            return split if split.best.shape[1] else shared, None
        heads = [head for head in self.heads if isinstance(head, ProposalHead)]
        proposals = [head(step.memory) for head in heads]
        outputs = [head.training_output(p) for head, p in zip(heads, proposals, strict=True)]
        logits = torch.cat([o.logits for o in outputs], dim=2)
        boxes = torch.cat([o.boxes for o in outputs], dim=2)
        embeds = joined([o.mask_embeds for o in outputs], dim=2)
        return side_by_side(proposals), DecoderOutput(logits, boxes, boxes, mask_embeds=embeds)

    def metrics(
        self, step: Step, blocks: Sequence[QueryBlock], assignments: Mapping[str, Assignment]
    ) -> dict[str, Tensor]:
        """`group/pd` and `group/md` of this batch,
        where asked for and where the queries have places.
        """
        groups = [b.queries.boxes for b in blocks if b.name in ("main", "group")]
        boxes = [b for b in groups if b is not None]
        if not self.config.distances or len(boxes) < 2:
            return {}
        centres = torch.cat(boxes, dim=1)[..., :2].detach()
        positions = centres.unflatten(1, (self.k, -1))
        matched = matched_positions(
            positions, [assignments["main"], assignments["group"]], len(step.targets.labels)
        )
        return {
            "group/pd": position_distance(positions).mean(),
            "group/md": matched_distance(matched).nanmean(),
        }


def sibling(head: ProposalHead) -> ProposalHead:
    """A head for another group: classes and boxes start equal,
    the projection before them afresh.
    """
    other = copy.deepcopy(head)
    nn.init.xavier_uniform_(other.projection.weight)
    return other
