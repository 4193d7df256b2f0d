"""Mixed precision: what is computed in bfloat16, and where.

Matrix products and convolutions are, wherever autocast takes them and the device multiplies
matrices of bfloat16: NVIDIA's GPUs from Ampere on, and CPUs with AMX. Losses, matching and
normalisation stay in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detrellis.errors import UserError


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16, and is known to gain by it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    amx: Any = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and amx is not None and bool(amx())


def check_bfloat16(device: torch.device) -> None:
    """Raises `UserError` for a device that has it not."""
    if not has_bfloat16(device):
        raise UserError(
            f"half precision is for NVIDIA's GPUs from Ampere on and for CPUs with AMX, and device "
            f"{device.type} is none of them",
            "Leave it out, or name another --device.",
        )


def autocast(device: torch.device, wanted: bool) -> torch.autocast:
    """A forward pass on the device: in bfloat16 where it is `wanted` and the device has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bfloat16(device))


def in_bfloat16_on_cpu(x: Tensor) -> bool:
    """Whether a CPU would compute in bfloat16 what reads `x`."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def slow_in_bfloat16(x: Tensor) -> bool:
    """Whether the gradients of an attention which reads `x` would be computed in bfloat16 by a CPU:
    it takes several times as long as in float32.
    """
    return in_bfloat16_on_cpu(x) and torch.is_grad_enabled()
