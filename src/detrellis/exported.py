"""Exported networks in the place of detectors:
the same resizing before them, the same post-processing after them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detrellis.detector import Detector
from detrellis.engine.card import Card
from detrellis.errors import UserError, first_line
from detrellis.recipes.network import build_postprocess
from detrellis.types import DecoderOutput, ImageBatch, Memory

Array = NDArray[Any]
Sides = tuple[int | None, int | None]  # height, width; None: any


class Network(NamedTuple):
    """What a runtime has loaded."""

    # Pictures (B, 3, h, w) from 0 to 1 to the outputs by name
    run: Callable[[Array], Mapping[str, Array]]
    metadata: Mapping[str, str]
    sides: Sides  # of the pictures that it takes


INPUT = "images"
IOU = "iou_logits"  # an output of a detector with an IoU branch
INSTALL_OPENVINO = "pip install 'detrellis[export,openvino]'"
INSTALL_INT8 = "pip install 'detrellis[export,int8]'"
INSTALL = "pip install 'detrellis[export]'"


class ExportedDetector(Detector):
    """A network that another runtime executes, with the call and the post-processing of a detector.

    It has no parts: what trains or analyses a detector refuses it.
    """

    def __init__(self, network: Network, card: Card, path: Path) -> None:
        nn.Module.__init__(self)
        self.network, self.path = network, path
        self.postprocess = build_postprocess(card.recipe.detector)
        # Says device and precision of what goes in
        self.place = nn.Parameter(torch.zeros(0), requires_grad=False)

    def forward(self, images: ImageBatch) -> DecoderOutput:
        """Outputs of the last decoder layer (L = 1) for pixels from 0 to 1;
        images of one size go in together.
        """
        count, sizes = len(images.pixels), _sizes(images)
        outputs: dict[str, Tensor] = {}
        for height, width in dict.fromkeys(sizes):
            self.check_size(height, width)
            rows = [i for i, size in enumerate(sizes) if size == (height, width)]
            pixels = images.pixels[rows, :, :height, :width].contiguous()
            for name, values in self.network.run(pixels.float().cpu().numpy()).items():
                part = torch.from_numpy(np.ascontiguousarray(values))
                whole = outputs.setdefault(name, part.new_zeros(count, *part.shape[1:]))
                whole[rows] = part
        logits, boxes = (outputs[name].float()[None] for name in ("logits", "boxes"))
        iou = outputs[IOU].float()[None] if IOU in outputs else None
        return DecoderOutput(logits, boxes, boxes.new_zeros(*boxes.shape[:3], 0), iou)

    def encode(self, images: ImageBatch) -> Memory:
        """Raises `UserError`: there is nothing inside."""
        self._refuse()

    def fused(self) -> Self:
        """Itself: it was fused when it was exported."""
        return self

    def check_size(self, height: int, width: int) -> None:
        """Raises `UserError` for pictures of a size that the file does not take."""
        if any(
            side not in (None, given)
            for side, given in zip(self.network.sides, (height, width), strict=True)
        ):
            taken = "x".join("any" if side is None else str(side) for side in self.network.sides)
            raise UserError(
                f"{self.path}: it takes pictures of {taken} pixels (height x width), and one is "
                f"{height}x{width}",
                "Export without --size, for pictures of any size.",
            )

    def _refuse(self) -> NoReturn:
        raise UserError(
            f"{self.path}: an exported network has no parts to look into",
            "Give the run that it was made from.",
        )


def _sizes(images: ImageBatch) -> list[tuple[int, int]]:
    """Height and width of each image without its padding."""
    if images.padding is None:
        return [(images.pixels.shape[-2], images.pixels.shape[-1])] * len(images.pixels)
    inside = ~images.padding
    columns, rows = inside[:, 0].sum(1).tolist(), inside[:, :, 0].sum(1).tolist()
    return list(zip(rows, columns, strict=True))


def load_exported(
    path: Path, opener: Callable[[Path], Network] | None = None
) -> tuple[ExportedDetector, Card]:
    """The network and the card of an exported file;
    pixels that go in are from 0 to 1, and the card's recipe says so.

    `opener` is that of the file's suffix unless given. Raises `UserError` where its runtime is not
    installed, or the file is not one of ours.
    """
    network = (opener or OPENERS[path.suffix])(path)
    card = Card.from_metadata(network.metadata, path)
    data = card.recipe.data.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    card = replace(card, recipe=card.recipe.model_copy(update={"data": data}))
    return ExportedDetector(network, card, path), card


def _open_onnx(path: Path) -> Network:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: onnxruntime is not installed, which runs it", INSTALL) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=onnxruntime.get_available_providers()
        )
    except Exception as error:  # its own classes, one for each status
        raise UserError(
            f"{path}: ONNX Runtime cannot load it: {first_line(error)}", "Export it again."
        ) from None
    names = [output.name for output in session.get_outputs()]

    def run(pixels: Array) -> Mapping[str, Array]:
        return dict(zip(names, session.run(names, {INPUT: pixels}), strict=True))

    height, width = (
        side if isinstance(side, int) else None for side in session.get_inputs()[0].shape[2:]
    )
    return Network(run, dict(session.get_modelmeta().custom_metadata_map), (height, width))


def _open_openvino(path: Path) -> Network:
    try:
        import openvino
    except ImportError:
        raise UserError(
            f"{path}: openvino is not installed, which runs it", INSTALL_OPENVINO
        ) from None
    core = openvino.Core()
    # By itself it rounds to bf16 on CPUs that multiply matrices of them (AMX)
    how = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    core.set_property("CPU", how)
    try:
        model = core.read_model(path)
        compiled = core.compile_model(model, "AUTO")
    except RuntimeError as error:
        raise UserError(
            f"{path}: OpenVINO cannot load it: {first_line(error)}", "Export it again."
        ) from None
    names = [output.get_any_name() for output in compiled.outputs]

    def run(pixels: Array) -> Mapping[str, Array]:
        results = compiled(pixels)
        return {name: results[i] for i, name in enumerate(names)}

    height, width = (
        side.get_length() if side.is_static else None
        for side in compiled.inputs[0].partial_shape[2:]
    )
    kept = [key for key in ("format", "detrellis", "precision") if model.has_rt_info(key)]
    metadata = {key: model.get_rt_info(key).astype(str) for key in kept}
    return Network(run, metadata, (height, width))


def open_own_program(path: Path) -> Network:
    """A `.pt2` file that this process has just written. It is no opener: `torch.export.load`
    unpickles, so that somebody else's file could do anything.
    """
    metadata: dict[str, Any] = dict.fromkeys(("format", "detrellis", "precision", "names"), "")
    program = torch.export.load(path, extra_files=metadata)
    module, names = program.module(), metadata["names"].split()

    def run(pixels: Array) -> Mapping[str, Array]:
        with torch.no_grad():
            outputs = module(torch.from_numpy(pixels))
        return {name: part.numpy() for name, part in zip(names, outputs, strict=True)}

    return Network(run, metadata, program_sides(program))


def program_shape(program: torch.export.ExportedProgram) -> Sequence[Any]:
    """Of the pictures that a program takes, `(B, 3, h, w)`: numbers, and symbols for any number."""
    (name,) = program.graph_signature.user_inputs
    (node,) = (node for node in program.graph.nodes if node.name == name)
    return [_settled(side) for side in node.meta["val"].shape]


def _settled(side: int | torch.SymInt) -> int | torch.SymInt:
    """The number that tracing has settled a symbol on, where it has."""
    number = side if isinstance(side, int) else side.node.maybe_as_int()
    return side if number is None else int(number)


def program_sides(program: torch.export.ExportedProgram) -> Sides:
    """Height and width of the pictures that a program takes."""
    height, width = (side if isinstance(side, int) else None for side in program_shape(program)[2:])
    return height, width


OPENERS: dict[str, Callable[[Path], Network]] = {
    ".onnx": _open_onnx,
    ".xml": _open_openvino,
}
