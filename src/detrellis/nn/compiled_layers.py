"""`torch.compile` of encoder and decoder layers in training."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from detrellis.errors import UserError, first_line
from detrellis.nn.compiler import import_compiler
from detrellis.nn.decoder import DecoderLayer
from detrellis.nn.encoder import EncoderLayer


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
