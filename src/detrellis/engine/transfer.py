"""Fine-tuning: the weights of one detector in another, made for other classes, with other queries or other parts.

What fits is copied, rows of the class heads by the classes' names; the report says what did not fit, and why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detrellis.data.classes import ClassMap
from detrellis.detector import Detector
from detrellis.engine.transfer_report import ClassRows, Fate, Transfer, amount, plural
from detrellis.errors import UserError

CLASS_HEAD = re.compile(r"(decoder\.heads\.classes\.\d+|queries\.head\.classify)\.(weight|bias)")
PROPOSALS = "queries.head.classify."
REFERENCE_BOXES = ("queries.centres", "queries.sizes")
PER_QUERY = ("queries.content", "queries.position", *REFERENCE_BOXES)
COUNTER = ".num_batches_tracked"  # nothing that BatchNorm computes here depends on it

# Made up from a number, or standing for an id that is not used: such a name does not say what the class is.
NAMELESS = re.compile(r"(n/a([ _-]*\d+)?|(class|category|label)[ _-]*\d+)?")

# The least share of a part that has to fit. A backbone that is half new undoes what the other half brings, and is not
# trained where its norms are frozen; an encoder with more layers, or wider ones, still gets a good start.
NEEDED = {"backbone": 0.5, "encoder": 0.1}

Rows = tuple[tuple[int, int], ...]  # (row here, row in the weights)


@dataclass(frozen=True)
class Source:
    """Weights that a run starts from, and their classes.

    `objectness`: row 0 of their proposals' class head tells objects from background, and is not class 0.
    """

    weights: Mapping[str, Tensor]
    classes: ClassMap
    objectness: bool = False


@dataclass(frozen=True)
class _Plan:
    """What one tensor takes from the weights: all, some rows, or nothing; `reason` where it is not all."""

    whole: bool = False
    rows: Rows = ()
    reason: str = ""
    detail: str = ""


def transfer(detector: Detector, classes: ClassMap, source: Source, *, objectness: bool = False) -> Transfer:
    """Copy what fits of `source` into `detector`, fresh and made for `classes`, and report.

    `objectness`: as in `Source`, of this detector. Raises `UserError`, and copies nothing, where the weights belong to
    another network.
    """
    own, weights = detector.state_dict(), source.weights
    by_name = rows_by_name(classes, source.classes)
    heads = _ClassHeads(len(classes), source, by_name, detector.postprocess.softmax, objectness)
    plans = {name: _plan(name, tensor, weights.get(name), heads) for name, tensor in own.items()}
    fates = [_fate(name, own[name], weights.get(name), plan) for name, plan in plans.items()]
    unused = {name: tensor for name, tensor in weights.items() if name not in own}
    fates += [Fate(n, "skipped", skipped=t.numel(), reason="not in this detector") for n, t in unused.items()]
    report = Transfer(
        tuple(f for f in fates if f.outcome == "loaded" or not f.name.endswith(COUNTER)),
        ClassRows.of(classes, source.classes, by_name if any(_in_class_head(f) for f in fates) else ()),
    )
    _refuse_another_network(report, own, weights)
    with torch.no_grad():
        for name, plan in plans.items():
            if plan.whole:
                own[name].copy_(weights[name])
            for ours, theirs in plan.rows:
                own[name][ours].copy_(weights[name][theirs])
    return report


def take_boxes(detector: Detector, weights: Mapping[str, Tensor]) -> None:
    """Copy the learned reference boxes of `weights` into `detector`, and nothing else (SAM-DETR, Table 5).

    Raises `UserError` where either has none, or another number of them.
    """
    own = detector.state_dict()
    for where, tensors in (("this detector learns", own), ("these weights hold", weights)):
        if not all(name in tensors for name in REFERENCE_BOXES):
            raise UserError(
                f"--boxes: {where} no reference boxes",
                "They belong to detectors with queries=anchors, such as sam-detr-r50 or dab-detr-r50.",
            )
    here, there = (len(tensors[REFERENCE_BOXES[0]]) for tensors in (own, weights))
    if here != there:
        raise UserError(
            f"--boxes: {there} reference boxes in the weights, {here} in this detector",
            f"Take as many: -o detector.query_count={there}.",
        )
    with torch.no_grad():
        for name in REFERENCE_BOXES:
            own[name].copy_(weights[name])


def _in_class_head(fate: Fate) -> bool:
    return bool(fate.loaded and CLASS_HEAD.fullmatch(fate.name))


def _plan(name: str, own: Tensor, found: Tensor | None, heads: _ClassHeads) -> _Plan:
    if found is None:
        return _Plan(reason="not in the weights")
    if CLASS_HEAD.fullmatch(name) and own.shape[1:] == found.shape[1:]:
        return heads.plan(name, found)
    if own.shape == found.shape:
        return _Plan(whole=True)
    if name in PER_QUERY and own.shape[1:] == found.shape[1:]:
        count = min(len(own), len(found))
        more = f"the first {count} of {len(found)} rows" if len(found) > count else f"{len(own) - count} rows are new"
        return _Plan(rows=tuple((i, i) for i in range(count)), reason=more)
    return _Plan(reason="another shape", detail=f"{_shape(own)}, was {_shape(found)}")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _fate(name: str, own: Tensor, found: Tensor | None, plan: _Plan) -> Fate:
    """What becomes of a tensor, for the report."""
    if plan.whole:
        return Fate(name, "loaded", loaded=own.numel())
    if found is None or not plan.rows:
        return Fate(name, "re-initialised", fresh=own.numel(), reason=plan.reason, detail=plan.detail)
    loaded = len(plan.rows) * own[0].numel()
    if len(plan.rows) == len(own) == len(found):
        return Fate(name, "loaded", loaded=loaded)
    return Fate(name, "in part", loaded=loaded, fresh=own.numel() - loaded, reason=plan.reason)


@dataclass(frozen=True)
class _ClassHeads:
    """Which rows of a class head are which, here and in the weights."""

    classes: int
    source: Source
    by_name: Rows
    softmax: bool
    objectness: bool

    def plan(self, name: str, found: Tensor) -> _Plan:
        """The rows that a class head takes. Softmax heads have a last row for "no object", whatever the classes."""
        there, rows = len(self.source.classes), self.by_name
        if len(found) not in (there, there + 1):
            return _Plan(reason=f"{len(found)} rows for {plural(there, 'class')} in the weights")
        if name.startswith(PROPOSALS) and self.objectness != self.source.objectness:
            return _Plan(reason=f"scores {'objects' if self.objectness else 'classes'} here, not in the weights")
        if name.startswith(PROPOSALS) and self.objectness:
            # Row 0 is no class, and the others have learnt to stay silent: none of them may start as row 0.
            rows = ((0, 0), *((i, j) for i, j in rows if i and j))
        if self.softmax and len(found) == there:
            return _Plan(rows=rows, reason='no row for "no object" in the weights')
        if self.softmax:
            rows = (*rows, (self.classes, there))
        return _Plan(rows=rows, reason=ClassRows.REASON)


def rows_by_name(classes: ClassMap, source: ClassMap) -> Rows:
    """The classes that both have, as rows of both; all of them, nameless ones too, where the lists are the same."""
    ours, theirs = ([name.strip().casefold() for name in c.names] for c in (classes, source))
    if ours == theirs:
        return tuple((i, i) for i in range(len(ours)))
    return tuple((i, theirs.index(n)) for i, n in enumerate(ours) if n in theirs and not NAMELESS.fullmatch(n))


def _refuse_another_network(report: Transfer, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Training would start, and throw away most of what the user thinks it starts from."""
    for part, needed in NEEDED.items():
        fates = [f for f in report.fates if f.part == part]
        fits = sum(f.loaded for f in fates) / max(1, sum(f.loaded + f.fresh for f in fates))
        if fits < needed:
            raise UserError(
                f"these weights belong to another network: {fits:.0%} of the {part} fits. "
                f"The recipe: {describe(own)}. The weights: {describe(weights)}",
                "Train with the weights' own recipe: leave RECIPE out, and what else changes the network.",
            )


def describe(weights: Mapping[str, Tensor]) -> str:
    """What a detector's weights tell about its sizes: `width 256, 6 encoder layers, 6 decoder layers, ...`."""
    width = next((len(t) for n, t in weights.items() if re.fullmatch(r"encoder\.layers\.\d+\.norm\.weight", n)), None)
    sizes = [] if width is None else [f"width {width}"]
    for part in ("encoder", "decoder"):
        layers = {found[1] for n in weights if (found := re.match(rf"{part}\.layers\.(\d+)\.", n))}
        sizes.append(plural(len(layers), f"{part} layer"))
    backbone = sum(t.numel() for n, t in weights.items() if n.startswith("backbone."))
    return ", ".join([*sizes, f"a backbone of {amount(backbone)} parameters"])
