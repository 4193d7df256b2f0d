"""Fine-tuning: the weights of one detector in another,
made for other classes, with other queries or other parts.

What fits is copied, rows of the class heads by the classes' names; the report says what did not
fit, and why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detrellis.data.classes import ClassMap
from detrellis.detector import Detector
from detrellis.engine.class_names import plain_name, same_meaning
from detrellis.engine.transfer_report import ClassRows, TensorFate, TransferReport, amount, plural
from detrellis.errors import UserError
from detrellis.types import IMAGENET_MEAN, IMAGENET_STD, Channels

CLASS_HEAD = re.compile(r"(decoder\.heads\.classes\.\d+|queries\.head\.classify)\.(weight|bias)")
PROPOSALS = "queries.head.classify."
REFERENCE_BOXES = ("queries.centres", "queries.sizes")
PER_QUERY = ("queries.content", "queries.position", *REFERENCE_BOXES)
COUNTER = ".num_batches_tracked"  # nothing that BatchNorm computes here depends on it

# Made up from a number, or standing for an id that is not used: such a name does not say what the
# class is.
NAMELESS = re.compile(r"(n/a([ _-]*\d+)?|(class|category|label)[ _-]*\d+)?")

# The least fraction of a part that has to fit. A backbone that is half new undoes what the other
# half brings, and is not trained where its norms are frozen; an encoder with more layers, or wider
# ones, still gets a good start.
NEEDED = {"backbone": 0.5, "encoder": 0.1}

Rows = tuple[tuple[int, int], ...]  # (row here, row in the weights)


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a run starts from, and their classes.

    `objectness`: row 0 of their proposals' class head tells objects from background, and is not
    class 0. `statistics`: mean and std that their pictures were normalised with, for a run that
    names no others.
    """

    weights: Mapping[str, Tensor]
    classes: ClassMap
    objectness: bool = False
    statistics: tuple[Channels, Channels] = (IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True)
class _TensorPlan:
    """What one tensor takes from the weights:
    all, some rows, or nothing; `reason` where it is not all.
    """

    whole: bool = False
    rows: Rows = ()
    reason: str = ""
    detail: str = ""


def transfer(
    detector: Detector, classes: ClassMap, source: InitialWeights, *, objectness: bool = False
) -> TransferReport:
    """Copy what fits of `source` into `detector`, fresh and made for `classes`, and report.

    `objectness`: as in `InitialWeights`, of this detector. Raises `UserError`, and copies nothing,
    where the weights belong to another network.
    """
    state, weights = detector.state_dict(), source.weights
    by_name = rows_by_name(classes, source.classes)
    heads = _ClassHeads(len(classes), source, by_name, detector.postprocess.softmax, objectness)
    plans = {name: _plan(name, tensor, weights.get(name), heads) for name, tensor in state.items()}
    fates = [_fate(name, state[name], weights.get(name), plan) for name, plan in plans.items()]
    unused = {name: tensor for name, tensor in weights.items() if name not in state}
    fates += [
        TensorFate(n, "skipped", skipped=t.numel(), reason="not in this detector")
        for n, t in unused.items()
    ]
    report = TransferReport(
        tuple(f for f in fates if f.outcome == "loaded" or not f.name.endswith(COUNTER)),
        ClassRows.of(
            classes, source.classes, by_name if any(_in_class_head(f) for f in fates) else ()
        ),
    )
    _refuse_another_network(report, state, weights)
    with torch.no_grad():
        for name, plan in plans.items():
            if plan.whole:
                state[name].copy_(weights[name])
            for ours, theirs in plan.rows:
                state[name][ours].copy_(weights[name][theirs])
    return report


def take_boxes(detector: Detector, weights: Mapping[str, Tensor]) -> None:
    """Copy the learned reference boxes of `weights` into `detector`,
    and nothing else (SAM-DETR, Table 5).

    Raises `UserError` where either has none, or another number of them.
    """
    state = detector.state_dict()
    for where, tensors in (("this detector learns", state), ("these weights hold", weights)):
        if not all(name in tensors for name in REFERENCE_BOXES):
            raise UserError(
                f"--boxes: {where} no reference boxes",
                "They belong to detectors with queries.kind=anchors, such as sam-detr-r50 or "
                "dab-detr-r50.",
            )
    here, there = (len(tensors[REFERENCE_BOXES[0]]) for tensors in (state, weights))
    if here != there:
        raise UserError(
            f"--boxes: {there} reference boxes in the weights, {here} in this detector",
            f"Take as many: -o detector.queries.count={there}.",
        )
    with torch.no_grad():
        for name in REFERENCE_BOXES:
            state[name].copy_(weights[name])


def _in_class_head(fate: TensorFate) -> bool:
    return bool(fate.loaded and CLASS_HEAD.fullmatch(fate.name))


def _plan(name: str, ours: Tensor, theirs: Tensor | None, heads: _ClassHeads) -> _TensorPlan:
    """What the tensor `ours` takes from the tensor `theirs` of the weights."""
    if theirs is None:
        return _TensorPlan(reason="not in the weights")
    if CLASS_HEAD.fullmatch(name) and ours.shape[1:] == theirs.shape[1:]:
        return heads.plan(name, theirs)
    if ours.shape == theirs.shape:
        return _TensorPlan(whole=True)
    if name in PER_QUERY and ours.shape[1:] == theirs.shape[1:]:
        count, more = min(len(ours), len(theirs)), len(ours) - len(theirs)
        reason = f"{more} rows are new" if more >= 0 else f"the first {count} of {len(theirs)} rows"
        return _TensorPlan(rows=tuple((i, i) for i in range(count)), reason=reason)
    return _TensorPlan(reason="another shape", detail=f"{_shape(ours)}, was {_shape(theirs)}")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _fate(name: str, ours: Tensor, theirs: Tensor | None, plan: _TensorPlan) -> TensorFate:
    """What becomes of a tensor, for the report."""
    if plan.whole:
        return TensorFate(name, "loaded", loaded=ours.numel())
    if theirs is None or not plan.rows:
        return TensorFate(
            name, "re-initialised", fresh=ours.numel(), reason=plan.reason, detail=plan.detail
        )
    loaded = len(plan.rows) * ours[0].numel()
    if len(plan.rows) == len(ours) == len(theirs):
        return TensorFate(name, "loaded", loaded=loaded)
    return TensorFate(
        name, "in part", loaded=loaded, fresh=ours.numel() - loaded, reason=plan.reason
    )


@dataclass(frozen=True)
class _ClassHeads:
    """Which rows of a class head are which, here and in the weights."""

    classes: int
    source: InitialWeights
    by_name: Rows
    softmax: bool
    objectness: bool

    def plan(self, name: str, theirs: Tensor) -> _TensorPlan:
        """The rows that a class head takes.
        Softmax heads have a last row for "no object", whatever the classes.
        """
        source_classes, rows = len(self.source.classes), self.by_name
        if len(theirs) not in (source_classes, source_classes + 1):
            return _TensorPlan(
                reason=f"{len(theirs)} rows for {plural(source_classes, 'class')} in the weights"
            )
        if name.startswith(PROPOSALS) and self.objectness != self.source.objectness:
            return _TensorPlan(
                reason=(
                    f"scores {'objects' if self.objectness else 'classes'} here, not in the weights"
                )
            )
        if name.startswith(PROPOSALS) and self.objectness:
            # Row 0 is no class, and the others have learnt to stay silent: none of them may start
            # as row 0.
            rows = ((0, 0), *((i, j) for i, j in rows if i and j))
        if self.softmax and len(theirs) == source_classes:
            return _TensorPlan(rows=rows, reason='no row for "no object" in the weights')
        if self.softmax:
            rows = (*rows, (self.classes, source_classes))
        return _TensorPlan(rows=rows, reason=ClassRows.REASON)


def rows_by_name(classes: ClassMap, source: ClassMap) -> Rows:
    """Pairs of rows of the classes that both have, equal names first;
    all, nameless ones too, of the same lists.
    """
    ours, theirs = ([plain_name(name) for name in c.names] for c in (classes, source))
    if ours == theirs:
        return tuple((i, i) for i in range(len(ours)))
    equal = {name: row for row, name in reversed(list(enumerate(theirs)))}
    alike = {same_meaning(name): row for name, row in equal.items()} | equal
    rows = [
        (i, alike.get(n, alike.get(same_meaning(n))))
        for i, n in enumerate(ours)
        if not NAMELESS.fullmatch(n)
    ]
    return tuple((i, row) for i, row in rows if row is not None)


def _refuse_another_network(
    report: TransferReport, state: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Raises `UserError` where too little fits:
    training would throw away what the user thinks it starts from.
    """
    for part, needed in NEEDED.items():
        fates = [f for f in report.fates if f.part == part]
        fits = sum(f.loaded for f in fates) / max(1, sum(f.loaded + f.fresh for f in fates))
        # A hybrid encoder and a projector are necks, with no encoder behind them
        if fates and fits < needed:
            raise UserError(
                f"these weights belong to another network: {fits:.0%} of the {part} fits. "
                f"The recipe: {describe(state)}. The weights: {describe(weights)}",
                "Train with the weights' own recipe: leave RECIPE out, and what else changes "
                "the network.",
            )


def describe(weights: Mapping[str, Tensor]) -> str:
    """What a detector's weights tell about its sizes:
    `width 256, 6 encoder layers, 6 decoder layers, ...`.
    """
    width = next(
        (
            len(t)
            for n, t in weights.items()
            if re.fullmatch(r"encoder\.layers\.\d+\.norm\.weight", n)
        ),
        None,
    )
    sizes = [] if width is None else [f"width {width}"]
    for part in ("encoder", "decoder"):
        layers = {match[1] for n in weights if (match := re.match(rf"{part}\.layers\.(\d+)\.", n))}
        sizes.append(plural(len(layers), f"{part} layer"))
    backbone = sum(t.numel() for n, t in weights.items() if n.startswith("backbone."))
    return ", ".join([*sizes, f"a backbone of {amount(backbone)} parameters"])
