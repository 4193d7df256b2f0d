"""A trained detector as a file for other runtimes:
ONNX, OpenVINO, or torch's own exported program.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from detrellis.data.transforms import eval_transform
from detrellis.engine.card import Card
from detrellis.engine.measure import image_size
from detrellis.errors import UserError, first_line
from detrellis.exported import INPUT, INSTALL, INSTALL_OPENVINO, program_shape, program_sides
from detrellis.exporting.graph import ExportGraph
from detrellis.exporting.int8 import Quantised, Quantiser
from detrellis.exporting.sizes import short_sizes
from detrellis.nn.kernels.grid import gathers
from detrellis.outputs import Outputs
from detrellis.predictions.model import Model
from detrellis.recipes.config import Recipe

ExportFormat = Literal["onnx", "openvino", "torch"]
SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
PACKAGES: dict[ExportFormat, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torch": (),
}
ABOUT = "RGB from 0 to 1, resized as the recipe says, not normalised; of one size in a batch"
# What half precision would break
FLOAT32 = ["TopK", "GridSample", "Range", "CumSum", "NonMaxSuppression", "Resize"]
# Where the exporter says which modules a node is in, from the outermost on
SCOPES = "pkg.torch.onnx.name_scopes"
# Say what they try: where CUDA is, when nncf is imported; each inequality of sizes that is not solved
CUDA, SHAPES = "torch.utils.cpp_extension", "torch.fx.experimental.symbolic_shapes"
EXAMPLE = 2  # images that the network is traced with; other numbers go through it as well


@dataclass(frozen=True)
class Exported:
    """What was written."""

    out: Path
    format: ExportFormat
    fp16: bool
    outputs: tuple[str, ...]  # names, in order
    # Height, width of the pictures that go in; None where any will do
    size: tuple[int | None, int | None]
    bytes: int
    int8: Quantised | None = None  # what eight bits cost

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"out": str(self.out)}


def write(
    model: Model,
    card: Card,
    out: Path,
    *,
    format_: ExportFormat,
    size: tuple[int, int] | None,
    detections: bool,
    fp16: bool,
    tensorrt: bool,
    int8: Quantiser | None,
    run: Path,
) -> Exported:
    """Write the detector of `model` to `out`, whose card goes with it;
    `run` is what it comes from, and is not touched.

    `size`: height and width of all pictures that will go in; None: any, or the one that the recipe
    stretches to. `tensorrt` gathers where others sample. `int8` puts an OpenVINO network in eight
    bits.

    Raises `UserError` for a detector that cannot be exported, where a package is missing, and where
    `int8` costs too much.
    """
    _refuse(model, out, format_, fp16)
    weights = out.with_suffix(".bin")  # OpenVINO's second file
    outputs = Outputs(out.parent)
    outputs.ready([out.name, *([weights.name] if format_ == "openvino" else [])], inputs=[run])
    graph = _graph(model, detections)
    precision = "int8" if int8 is not None else "float16" if fp16 else "float32"
    metadata = card.to_metadata() | {
        "classes": json.dumps(list(card.classes.names)),
        "input": ABOUT,
        "precision": precision,
    }
    quantised = None
    sampling = gathers() if tensorrt else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        with sampling:
            program = _traced(graph, model.recipe, size)
        made = Path(scratch, "model").with_suffix(SUFFIXES[format_])
        if format_ == "torch":
            torch.export.save(
                program, made, extra_files=metadata | {"names": " ".join(graph.names)}
            )
        else:
            onnx = made.with_suffix(".onnx")
            _write_onnx(program, graph.names, onnx, metadata, fp16=fp16 and format_ == "onnx")
        if format_ == "openvino":
            _write_openvino(onnx, made, metadata, fp16)
        if int8 is not None:
            network, made = made, made.with_stem("int8")
            quantised = int8.quantise(network, made, metadata)
        files = [path for path in (made, made.with_suffix(".bin")) if path.is_file()]
        for path in files:
            outputs.write_with(out.with_suffix(path.suffix).name, partial(shutil.copyfile, path))
        written = sum(path.stat().st_size for path in files)
    return Exported(out, format_, fp16, graph.names, program_sides(program), written, quantised)


def _refuse(model: Model, out: Path, format_: ExportFormat, fp16: bool) -> None:
    if model.recipe.detector.masks is not None:
        raise UserError(
            f"{model.recipe.name} gives masks, and masks are not exported yet",
            "Export a box detector.",
        )
    if model.recipe.data.pad is not None:
        problem = (
            f"{model.recipe.name} reads padding as a part of the picture (data.pad), which is "
            "not exported yet"
        )
        raise UserError(problem, "Export a detector that was trained with another augmentation.")
    if out.suffix != SUFFIXES[format_]:
        right = out.with_suffix(SUFFIXES[format_])
        raise UserError(
            f"--out {out}: {format_} files end in {right.suffix}", f"Take --out {right}."
        )
    if fp16 and format_ == "torch":
        raise UserError(
            "--fp16 with --format torch",
            "Take onnx or openvino, or convert the program where it runs.",
        )
    for package in PACKAGES[format_]:
        if importlib.util.find_spec(package) is None:
            install = INSTALL_OPENVINO if format_ == "openvino" else INSTALL
            raise UserError(
                f"--format {format_} needs the package {package}, which is not installed", install
            )


def _graph(model: Model, detections: bool) -> ExportGraph:
    """The detector, fused, in float32 on the CPU; the model's stays as it is."""
    data = model.recipe.data
    canvas = eval_transform(data.size, **data.resizing()).pad_to if data.keep_aspect else None
    detector = model.detector.fused().cpu().float()
    return (
        ExportGraph(detector, model.normalise, canvas, detections=detections)
        .eval()
        .requires_grad_(False)
    )


def _traced(
    graph: ExportGraph, recipe: Recipe, size: tuple[int, int] | None
) -> torch.export.ExportedProgram:
    """The program for any number of pictures, of one `size` or of any.
    Raises `UserError` where that cannot be.
    """
    data = recipe.data
    height, width = image_size(recipe) if size is None else size
    auto = torch.export.Dim.AUTO
    free = {0: auto}
    if size is None and (data.keep_aspect or isinstance(data.size, int) or data.match_orientation):
        free |= {2: auto, 3: auto}
        # Less than a canvas, or the padding to it would be traced as none
        height, width = height - 2, width - 6
    pictures = torch.rand(EXAMPLE, 3, height, width, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), short_sizes():
            program = torch.export.export(
                graph, (pictures,), dynamic_shapes={INPUT: free}, strict=False
            )
    except Exception as error:  # whatever a part does that cannot be traced
        raise UserError(f"{recipe.name} cannot be exported: {first_line(error)}") from error
    if isinstance(program_shape(program)[0], int):
        raise UserError(
            f"{recipe.name} cannot be exported for other batches than of {EXAMPLE} pictures"
        )
    return program


def _write_onnx(
    program: torch.export.ExportedProgram,
    names: Sequence[str],
    out: Path,
    metadata: Mapping[str, str],
    *,
    fp16: bool,
) -> None:
    import onnx

    exported = torch.onnx.export(
        program, input_names=[INPUT], output_names=list(names), dynamo=True, verbose=False
    )
    assert exported is not None
    exported.save(out)
    model = onnx.load(out)
    _name_nodes(model.graph.node)
    if fp16:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(model, keep_io_types=True, op_block_list=FLOAT32)
    # Names of the axes that stay open, instead of numbers.
    for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
        dimension = model.graph.input[0].type.tensor_type.shape.dim[axis]
        if dimension.dim_param:
            dimension.dim_param = name
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, out)


def _name_nodes(nodes: Sequence[Any]) -> None:
    """Each after the module that it is a part of, and itself."""
    for node in nodes:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "[]")
        node.name = "/".join([*ast.literal_eval(scopes)[-2:-1], node.name]).lstrip("/")


def _write_openvino(onnx: Path, out: Path, metadata: Mapping[str, str], fp16: bool) -> None:
    import openvino

    model = openvino.convert_model(onnx)
    for key, value in metadata.items():
        model.set_rt_info(value, [key])
    openvino.save_model(model, out, compress_to_fp16=fp16)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say to themselves,
    and what OpenVINO and nncf tell their makers but in CI jobs.
    """
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", CUDA, SHAPES)
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    job = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.pop("CI")
        if job is not None:
            os.environ["CI"] = job
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
