"""`detrellis export`: write a run's network for another runtime, and compare the two."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detrellis.arguments import checked
from detrellis.distributed import World
from detrellis.engine.evaluate import EvalOptions, collect
from detrellis.errors import UserError
from detrellis.exported import ExportedDetector
from detrellis.exporting.verify import Verification, compare_on_pictures
from detrellis.exporting.write import SUFFIXES, Exported, ExportFormat, write
from detrellis.interop.convert import load_any
from detrellis.interop.load import is_foreign
from detrellis.loading import load_trained, open_split, trained


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how it compares with the run where that was asked for."""

    exported: Exported
    verification: Verification | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        verification = None if self.verification is None else self.verification.to_dict()
        return self.exported.to_dict() | {"verification": verification}


@checked
def export(
    run: str | Path,
    out: str | Path | None = None,
    *,
    format: ExportFormat = "onnx",
    size: tuple[int, int] | None = None,
    detections: bool = False,
    fp16: bool = False,
    verify: str | Path | None = None,
) -> ExportResult:
    """Write the detector of `run` (or of whatever `load` takes) for ONNX Runtime, OpenVINO or torch.

    `out` is `model.onnx` (`.xml`, `.pt2`) in the run's folder unless given. Pictures go in as RGB from 0 to 1,
    resized as the recipe says, any number at a time; all of one `size` (height, width) where it is given, else of
    any, which takes minutes to trace, or of the one that the recipe stretches them to. `detections` adds ranked
    scores, labels and corners to the outputs (`exporting/graph.py`). `fp16` stores and computes half precision where
    that is safe. `verify` names pictures: the file is then run on them in batches of 1, 2 and 5, and on the run's
    validation split if that is there; `result.verification.passed` says whether it detects the same.

    Raises `UserError` for a detector that cannot be exported, and where a package is missing.
    """
    model = load_trained(run, "cpu")
    if isinstance(model.detector, ExportedDetector):
        raise UserError(f"{run}: it is exported already", "Give the run that it was made from.")
    card = load_any(trained(run))[1]
    if out is None:
        if is_foreign(run):
            raise UserError(f"{run}: no folder to write to", f"Say where: --out model{SUFFIXES[format]}.")
        place = Path(run)
        out = (place if place.is_dir() else place.parent) / f"model{SUFFIXES[format]}"
    if verify is not None and format == "torch":
        raise UserError(
            "--verify with --format torch", "It runs what ONNX Runtime or OpenVINO executes: --format onnx."
        )
    protected = Path(trained(run))
    done = write(model, card, Path(out), format_=format, size=size, detections=detections, fp16=fp16, run=protected)
    if verify is None:
        return ExportResult(done, None)
    theirs = load_trained(done.out, "cpu")
    rows = compare_on_pictures(model, theirs, verify, fp16=fp16)
    ap = None
    with contextlib.suppress(UserError):  # its validation split is not there, or it has none
        ap = _ap(run)
    return ExportResult(done, Verification(rows, ap, None if ap is None else _ap(done.out), fp16))


def _ap(run: str | Path) -> float | None:
    """AP on the run's own validation split."""
    world = World(0, 1, torch.device("cpu"))
    with open_split(run, world, EvalOptions(workers=0)) as opened:
        (evaluator,) = collect(opened.model.detector, opened.loader, opened.annotations, world.device)
        return evaluator.compute().ap
