"""`torch.compile` of the layers that a training step spends its operations on."""

from __future__ import annotations

import contextlib
import importlib
import logging

import torch
from torch import nn

from detrellis.errors import UserError, first_line
from detrellis.nn.decoder import DecoderLayer
from detrellis.nn.encoder import EncoderLayer

EXTENSIONS = "torch.utils.cpp_extension"


def compile_layers(model: nn.Module, device: torch.device, backend: str = "inductor") -> None:
    """Compile each layer of the model's encoders and decoders where it stands. Layers of one kind
    have one code, whatever the size of the images and the number of queries, and the names of
    parameters stay. What happens between layers is no part of it, since schemes and heads add to
    it, nor is evaluation (`eager`).

    Raises `UserError` where nothing can be compiled for the `device`.
    """
    import_compiler()
    try:
        torch.compile(torch.neg, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # no C++ compiler, a Triton that does not know the GPU, ...
        raise UserError(
            f"optim.compile: torch.compile does not work on {device}: {first_line(error)}",
            "Install a C++ compiler (g++), or take -o optim.compile=false.",
        ) from None
    for module in model.modules():
        if isinstance(module, EncoderLayer | DecoderLayer):
            module.compile(backend=backend, dynamic=True)


def eager() -> contextlib.AbstractContextManager[None]:
    """Within it compiled layers run as if they were not."""
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def import_compiler() -> None:
    """Import what is imported for a CPU's code,
    without its line that there is CUDA and no GPU: nobody asked for one.

    The line is logged by that import, where CUDA's tools are installed; call this before
    `torch.compile`. What else the module logs, then or later, is not touched.
    """
    logger = logging.getLogger(EXTENSIONS)
    logger.addFilter(_is_news)
    try:
        with contextlib.suppress(ImportError):  # then the compiler says whether it needs it
            importlib.import_module(EXTENSIONS)
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()
