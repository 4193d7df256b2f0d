"""BatchNorm that training leaves as it is: a scale and a shift of each channel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detrellis.nn.constants import traced


class _Affine(NamedTuple):
    """What buffers of these versions made."""

    buffers: tuple[Tensor, ...]
    versions: tuple[int, ...]
    scale: Tensor  # (1, D, 1, 1)
    shift: Tensor  # (1, D, 1, 1)


class FrozenNorm(nn.Module):
    """BatchNorm of maps whose statistics and affine stay, in buffers;
    the bits of torchvision's FrozenBatchNorm2d.

    Scale and shift are computed once and not at each step, as long as nobody replaces the buffers
    or writes into them.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    _affine: _Affine | None = None

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in {
            "weight": 1.0,
            "bias": 0.0,
            "running_mean": 0.0,
            "running_var": 1.0,
        }.items():
            self.register_buffer(name, torch.full((channels,), value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also of a BatchNorm, which counts its batches."""
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, D, H, W)` to the same."""
        scale, shift = self.affine()
        return (x * scale).add_(shift)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of the channels, `(1, D, 1, 1)` each."""
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if traced() or any(buffer.is_inference() for buffer in buffers):
            return self._computed()
        kept, versions = self._affine, tuple(buffer._version for buffer in buffers)
        if kept is None or kept.versions != versions or any(map(_differ, kept.buffers, buffers)):
            with torch.inference_mode(False):  # a later step may need it for its gradients
                kept = self._affine = _Affine(buffers, versions, *self._computed())
        return kept.scale, kept.shift

    def _computed(self) -> tuple[Tensor, Tensor]:
        weight, bias, mean, variance = (
            buffer.reshape(1, -1, 1, 1)
            for buffer in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (variance + self.eps).rsqrt()
        return scale, bias - mean * scale

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed: copies and files have the buffers alone."""
        return {name: value for name, value in self.__dict__.items() if name != "_affine"}


def _differ(a: Tensor, b: Tensor) -> bool:
    return a is not b
