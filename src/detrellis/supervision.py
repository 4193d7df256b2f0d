"""Supervision of a block of queries: which query learns which target, and by what loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from detrellis.mask_points import Sampling, mask_iou, mask_terms
from detrellis.matching import Assign, Hungarian, Known, Match, United, assign
from detrellis.pairs import Pairs, Solved, pair_up, pair_up_all
from detrellis.set_loss import ABSENT, LossRule, SetLoss
from detrellis.types import Assignment, DecoderOutput, Targets, on_device

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
    normaliser = tasks[0].normaliser
    counts = [len(assignments[i].query) / tasks[i].match.shape[0] for i in united]
    pairs = dict(
        zip(
            united,
            mean(on_device(counts, normaliser.device, normaliser.dtype)).clamp(min=1),
            strict=True,
        )
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
    with torch.autocast(tasks[0].match.output.boxes.device.type, enabled=False):
        problems = [
            Solved(_counting(task), task.match.targets, rows)
            for task, rows in zip(tasks, assignments, strict=True)
        ]
        paired = _paired([task.rule for task in tasks], problems)
        terms = list(map(_terms, tasks, problems, paired))
    for task, problem, of_task in zip(tasks, problems, terms, strict=True):
        for name, values in of_task.items():
            weighted = values * task.weights[name]
            losses |= {
                f"{task.name}/{name}/{layer}": v for layer, v in enumerate(weighted.unbind())
            }
        if not problem.output.boxes.shape[-1]:  # a detector of masks
            metrics[f"{task.name}/iou"] = mask_iou(*problem, task.match.counts).mean()
    return losses, metrics | _matched_ious(tasks, problems, paired)


def _terms(task: Task, problem: Solved, pairs: Pairs | None) -> dict[str, Tensor]:
    """What the rule of a task makes of its problem, `(L,)` each, before the terms' weights."""
    ours = task.rule if isinstance(task.rule, SetLoss) else None
    if ours is not None and pairs is not None:
        terms = ours.of_pairs(problem.output, pairs, task.normaliser)
    else:
        terms = task.rule(*problem, task.normaliser)
    if task.match.sampling is not None:
        weight = None if ours is None else ours.pair_weight(*problem)
        arguments = (task.normaliser, task.match.sampling, task.match.counts)
        terms |= mask_terms(*problem, *arguments, weight)
    return terms


def _counting(task: Task) -> DecoderOutput:
    """A task's output in the targets' precision, with the classes that count alone."""
    targets = task.match.targets
    output = task.match.output.map(partial(Tensor.to, dtype=targets.boxes.dtype))
    if task.columns is None:
        return output
    return output._replace(logits=output.logits.masked_fill(~task.columns(targets), ABSENT))


def _paired(rules: Sequence[LossRule], problems: Sequence[Solved]) -> list[Pairs | None]:
    """The pairs of each problem whose rule is a `SetLoss`; of all that compare boxes alike in one
    pass."""
    epsilons = [rule.iou_eps if isinstance(rule, SetLoss) else None for rule in rules]
    paired: list[Pairs | None] = [None] * len(problems)
    for eps in {e for e in epsilons if e is not None}:
        chosen = [i for i, e in enumerate(epsilons) if e == eps]
        for i, pairs in zip(chosen, pair_up_all([problems[i] for i in chosen], eps), strict=True):
            paired[i] = pairs
    return paired


@torch.no_grad()
def _matched_ious(
    tasks: Sequence[Task], problems: Sequence[Solved], paired: Sequence[Pairs | None]
) -> dict[str, Tensor]:
    """Mean IoU of the last layer's positives with their targets, `"block/iou"`;
    NaN where there is none.
    """
    means = {}
    for task, problem, pairs in zip(tasks, problems, paired, strict=True):
        output, _, positives = problem
        if not output.boxes.shape[-1]:
            continue
        if pairs is None or not isinstance(task.rule, SetLoss) or task.rule.iou_eps:
            pairs = pair_up(*problem)
        last = positives.layer == len(output.boxes) - 1
        means[f"{task.name}/iou"] = (pairs.iou * last).sum() / last.sum()
    return means
