"""Supervision of a block of queries: which query learns which target, and by what loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, iou
from detrellis.mask_points import Sampling, mask_iou, mask_terms
from detrellis.matching import Assign, Hungarian, Known, Match, United, assign
from detrellis.set_loss import ABSENT, LossRule, SetLoss
from detrellis.types import Assignment, DecoderOutput, Targets

# The classes whose losses count in a step, (C,) bool, of its targets.
Columns = Callable[[Targets], Tensor]


@dataclass(frozen=True)
class Supervision:
    """Assignment, loss rule, and the weight of each of the rule's terms."""

    assign: Assign = field(default_factory=Hungarian)
    rule: LossRule = field(default_factory=SetLoss)
    weights: Mapping[str, float] = field(
        default_factory=lambda: {
            "class": 1.0,
            "box": 5.0,
            "giou": 2.0,
            "iou_branch": 1.0,
            "fgl": 0.15,
            "ddf": 1.5,
            "salience": 2.0,
        }
    )
    # Of pairs that are not matched; None: the same
    known_weights: Mapping[str, float] | None = None
    proposal_rule: LossRule | None = None  # of the encoder's proposals; None: the same
    columns: Columns | None = None  # None: the losses of all classes count

    def known(self, assignment: Assignment, counts: tuple[int, ...] = ()) -> Supervision:
        """This supervision with an assignment that is known beforehand, as denoising's;
        `counts`: see `Known`.
        """
        return replace(
            self, assign=Known(assignment, counts), weights=self.known_weights or self.weights
        )

    def proposals(self) -> Supervision:
        """This supervision for the encoder's proposals, which are one layer."""
        assert isinstance(self.assign, Hungarian)
        return replace(
            self, assign=self.assign.for_proposals(), rule=self.proposal_rule or self.rule
        )

    def initial(self, layers: int) -> Supervision:
        """This supervision for what the first of `layers` layers says before it has
        distributions.
        """
        assert not isinstance(self.assign, United)
        if isinstance(self.assign, Known):
            return replace(self, assign=self.assign.for_initial(layers))
        return replace(self, assign=self.assign.for_initial())

    def task(
        self,
        name: str,
        output: DecoderOutput,
        targets: Targets,
        normaliser: Tensor,
        copies: int = 1,
        weight: float = 1,
        sampling: Sampling | None = None,
    ) -> Task:
        """This supervision of a block's `output`, matched in each of its `copies`,
        its losses times `weight`; with `sampling`, of masks too."""
        weights = {term: of_term * weight for term, of_term in self.weights.items()}
        matching = Match(output, targets, self.assign, copies, sampling)
        return Task(name, matching, self.rule, weights, normaliser, self.columns)


def leaving_out(rule: LossRule, unused: Tensor) -> LossRule:
    """`rule` without the queries `unused (B, N)`, of slots that hold nothing:
    they do not even count as negatives.
    """

    def masked(
        output: DecoderOutput, targets: Targets, assignment: Assignment, normaliser: Tensor
    ) -> dict[str, Tensor]:
        logits = output.logits.masked_fill(unused.unsqueeze(-1), ABSENT)
        return rule(output._replace(logits=logits), targets, assignment, normaliser)

    return masked


@dataclass(frozen=True)
class Task:
    """One block's matching problem, and what its loss needs beside the assignment."""

    name: str
    match: Match
    rule: LossRule
    weights: Mapping[str, float]  # of the rule's terms
    normaliser: Tensor  # scalar: the number of boxes that the sums are divided by
    columns: Columns | None = None  # of classes that count; None: all


def uniting(tasks: Sequence[Task]) -> list[Task]:
    """The `tasks` of one block: of its layers, and of what stands before them.

    Where their matches are united, the boxes are tasks of their own, the first ones, which learn by
    the union; their normaliser has to be counted (`counted`). Masks learn by the layer's own match,
    as classes do.
    """
    if not all(
        isinstance(task.match.assign, Hungarian) and task.match.assign.union for task in tasks
    ):
        return list(tasks)
    union = United(tuple(task.match for task in tasks))
    boxes, classes = [], []
    for task in tasks:
        assert isinstance(task.rule, SetLoss), (
            "only a rule of two parts can learn by two assignments"
        )
        classes.append(replace(task, rule=task.rule.of_classes))
        boxes.append(
            replace(
                task,
                rule=task.rule.of_boxes,
                match=replace(task.match, assign=union, sampling=None),
            )
        )
    return [*boxes, *classes]


def counted(
    tasks: Sequence[Task], assignments: Sequence[Assignment], mean: Callable[[Tensor], Tensor]
) -> list[Task]:
    """The tasks with the pairs of each union,
    averaged over all processes by `mean`, to divide its sums by.
    """
    united = [i for i, task in enumerate(tasks) if isinstance(task.match.assign, United)]
    if not united:
        return list(tasks)
    counts = [len(assignments[i].query) / tasks[i].match.shape[0] for i in united]
    pairs = dict(
        zip(united, mean(tasks[0].normaliser.new_tensor(counts)).clamp(min=1), strict=True)
    )
    return [
        replace(task, normaliser=pairs[i]) if i in pairs else task for i, task in enumerate(tasks)
    ]


def match(tasks: Sequence[Task]) -> list[Assignment]:
    """The assignments of all tasks, with one copy to the host."""
    return assign([task.match for task in tasks])


def supervise(
    tasks: Sequence[Task], assignments: Sequence[Assignment] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weighted losses `"block/term/layer"` of all tasks, and metrics;
    matched first where they are not.

    Losses and boxes are computed in float32 or better whatever autocast says.
    """
    assignments = match(tasks) if assignments is None else assignments
    losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    for task, positives in zip(tasks, assignments, strict=True):
        output, targets = task.match.output, task.match.targets
        with torch.autocast(output.boxes.device.type, enabled=False):
            output = output._replace(passed=()).map(partial(Tensor.to, dtype=targets.boxes.dtype))
            if task.columns is not None:
                output = output._replace(
                    logits=output.logits.masked_fill(~task.columns(targets), ABSENT)
                )
            terms = task.rule(output, targets, positives, task.normaliser)
            if task.match.sampling is not None:
                weight = (
                    task.rule.pair_weight(output, targets, positives)
                    if isinstance(task.rule, SetLoss)
                    else None
                )
                arguments = (task.normaliser, task.match.sampling, task.match.counts)
                terms |= mask_terms(output, targets, positives, *arguments, weight)
        for name, values in terms.items():
            weighted = values * task.weights[name]
            losses |= {
                f"{task.name}/{name}/{layer}": v for layer, v in enumerate(weighted.unbind())
            }
        if not output.boxes.shape[-1]:  # a detector of masks
            metrics[f"{task.name}/iou"] = mask_iou(
                output, targets, positives, task.match.counts
            ).mean()
    return losses, metrics | matched_ious(tasks, assignments)


@torch.no_grad()
def matched_ious(tasks: Sequence[Task], assignments: Sequence[Assignment]) -> dict[str, Tensor]:
    """Mean IoU of the last layer's positives with their targets, `"block/iou"`;
    NaN where there is none.

    All tasks at once: there are few boxes, and every operation costs the same.
    """
    boxed = [
        (task, rows)
        for task, rows in zip(tasks, assignments, strict=True)
        if task.match.output.boxes.shape[-1]
    ]
    if not boxed:
        return {}
    predicted = torch.cat(
        [task.match.output.boxes[rows.layer, rows.image, rows.query] for task, rows in boxed]
    )
    truth = torch.cat([task.match.targets.boxes[rows.target] for task, rows in boxed])
    overlaps = iou(cxcywh_to_xyxy(predicted.to(truth.dtype)), cxcywh_to_xyxy(truth))
    means = {}
    for (task, rows), overlap in zip(
        boxed, overlaps.split([len(rows.layer) for _, rows in boxed]), strict=True
    ):
        last = rows.layer == len(task.match.output.boxes) - 1
        means[f"{task.name}/iou"] = (overlap * last).sum() / last.sum()
    return means
