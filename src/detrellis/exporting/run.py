"""`detrellis export`: write a run's network for another runtime, and compare the two."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detrellis.arguments import checked
from detrellis.distributed import World
from detrellis.engine.evaluate import EvalOptions, collect
from detrellis.errors import UserError
from detrellis.exported import INSTALL_INT8, ExportedDetector, load_exported, open_own_program
from detrellis.exporting.int8 import Quantiser
from detrellis.exporting.verify import Verification, check_pictures, compare_on_pictures
from detrellis.exporting.write import SUFFIXES, Exported, ExportFormat, write
from detrellis.interop.convert import load_any
from detrellis.interop.load import is_foreign
from detrellis.loading import exported_model, load_trained, open_split, trained
from detrellis.predictions.model import Model


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
    tensorrt: bool = False,
    int8: bool = False,
    calibrate: str | Path | None = None,
    verify: str | Path | None = None,
) -> ExportResult:
    """Write the detector of `run` (or of whatever `load` takes) for ONNX Runtime,
    OpenVINO or torch.

    `out` is `model.onnx` (`.xml`, `.pt2`) in the run's folder unless given. Pictures go in as RGB
    from 0 to 1, resized as the recipe says, any number at a time; all of one `size` (height, width)
    where it is given, else of any, which takes minutes to trace, or of the one that the recipe
    stretches them to. `detections` adds ranked scores, labels and corners to the outputs
    (`exporting/graph.py`). `fp16` stores and computes half precision where that is safe. `tensorrt`
    writes gathers where ONNX has GridSample, which TensorRT 10.14 to 11.1 computes wrongly. `int8`,
    for OpenVINO, computes backbone, neck and encoder in eight bits (`exporting/int8.py`). It is
    calibrated on training images of the run, or of the data set `calibrate`, and written, as
    `model-int8.xml`, only where AP on the validation images falls by no more than 0.01;
    `result.exported.int8` has both. `verify` names pictures: the file is then run on them in
    batches of 1, 2 and 5, and on the run's validation split if that is there;
    `result.verification.passed` says whether it detects the same.

    Raises `UserError` for a detector that cannot be exported, where a package is missing, and where
    `int8` costs too much.
    """
    model = load_trained(run, "cpu")
    if isinstance(model.detector, ExportedDetector):
        raise UserError(f"{run}: it is exported already", "Give the run that it was made from.")
    card = load_any(trained(run))[1]
    _refuse(format, fp16, tensorrt, int8, calibrate, verify)
    if verify is not None:
        check_pictures(verify, model.recipe.data, size)
    name = f"model{'-int8' if int8 else ''}{SUFFIXES[format]}"
    file = _in_folder_of(run, name) if out is None else Path(out)
    quantiser = Quantiser(run, model, calibrate) if int8 else None
    done = write(
        model,
        card,
        file,
        format_=format,
        size=size,
        detections=detections,
        fp16=fp16,
        tensorrt=tensorrt,
        int8=quantiser,
        run=Path(trained(run)),
    )
    return ExportResult(done, None if verify is None else _verified(run, model, done, verify))


def _verified(run: str | Path, model: Model, done: Exported, pictures: str | Path) -> Verification:
    """What the file and the run's `model` detect, side by side."""
    opener = open_own_program if done.format == "torch" else None
    theirs = exported_model(*load_exported(done.out, opener), torch.device("cpu"))
    rows = compare_on_pictures(model, theirs, pictures, fp16=done.fp16)
    try:
        ap, their_ap, why_not = _ap(run, model), _ap(done.out, theirs), None
    except UserError as error:  # no validation split, or one with pictures of other sizes
        ap, their_ap, why_not = None, None, error.message
    return Verification(rows, ap, their_ap, done.fp16, why_not)


def _in_folder_of(run: str | Path, name: str) -> Path:
    """The file of this `name` in a run's folder; `UserError` for weights that lie in none."""
    if is_foreign(run):
        raise UserError(f"{run}: no folder to write to", f"Say where: --out {name}.")
    place = Path(run)
    return (place if place.is_dir() else place.parent) / name


def _refuse(
    format_: ExportFormat,
    fp16: bool,
    tensorrt: bool,
    int8: bool,
    calibrate: str | Path | None,
    verify: str | Path | None,
) -> None:
    """Raises `UserError` for arguments that cannot be combined, and where nncf is missing."""
    if calibrate is not None and not int8:
        raise UserError(
            "--calibrate without --int8", "Only integers are calibrated: --format openvino --int8."
        )
    if tensorrt and format_ != "onnx":
        raise UserError(
            f"--tensorrt with --format {format_}", "TensorRT reads ONNX: --format onnx."
        )
    if not int8:
        return
    if format_ != "openvino":
        raise UserError(
            f"--int8 with --format {format_}", "OpenVINO computes in eight bits: --format openvino."
        )
    if fp16 or verify is not None:
        raise UserError(
            f"--int8 with {'--fp16' if fp16 else '--verify'}",
            "Leave one of them out: --int8 measures itself what it costs, in AP.",
        )
    if importlib.util.find_spec("nncf") is None:
        raise UserError("--int8 needs the package nncf, which is not installed", INSTALL_INT8)


def _ap(run: str | Path, model: Model) -> float | None:
    """AP of the `model` on the run's own validation split."""
    world = World(0, 1, torch.device("cpu"))
    with open_split(run, world, EvalOptions(workers=0), model) as opened:
        (evaluator,) = collect(
            opened.model.detector, opened.loader, opened.annotations, world.device
        )
        return evaluator.compute().ap
