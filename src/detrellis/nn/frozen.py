"""BatchNorm that training leaves as it is: a scale and a shift of each channel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from detrellis.nn.constants import traced


class _Affine(NamedTuple):
    """What buffers of these versions made, for maps of one dtype."""

    buffers: tuple[Tensor, ...]
    versions: tuple[int, ...]
    scale: Tensor  # (1, D, 1, 1)
    shift: Tensor  # (1, D, 1, 1)


class FrozenNorm(nn.Module):
    """BatchNorm of maps whose statistics and affine stay, in buffers;
    the bits of torchvision's FrozenBatchNorm2d.

    Maps keep their dtype: under autocast those of a convolution stay in bf16, or every one of them
    would be held in float32, too. Scale and shift are computed once and not at each step, as long
    as nobody replaces the buffers or writes into them.
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
        scale, shift = self.scale_and_shift(x.dtype)
        return (x * scale).add_(shift)

    def scale_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and shift of the channels, `(1, D, 1, 1)` each, for maps of this dtype."""
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if traced() or any(buffer.is_inference() for buffer in buffers):
            return self._computed(dtype)
        kept, versions = self._affine, tuple(buffer._version for buffer in buffers)
        if (
            kept is None
            or kept.versions != versions
            or kept.scale.dtype is not dtype
            or any(map(_differ, kept.buffers, buffers))
        ):
            with torch.inference_mode(False):  # a later step may need it for its gradients
                kept = self._affine = _Affine(buffers, versions, *self._computed(dtype))
        return kept.scale, kept.shift

    def _computed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight, bias, mean, variance = (
            buffer.reshape(1, -1, 1, 1)
            for buffer in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (variance + self.eps).rsqrt()
        return scale.to(dtype), (bias - mean * scale).to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed: copies and files have the buffers alone."""
        return {name: value for name, value in self.__dict__.items() if name != "_affine"}


class FrozenNormAct(FrozenNorm):
    """The same with timm's dropout and activation after it; `freeze_timm` makes it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, D, H, W)` to the same."""
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


def freeze_timm(model: nn.Module) -> nn.Module:
    """Freeze the BatchNorms of a timm model, also those with an activation. Names stay."""
    from timm.layers.norm_act import FrozenBatchNormAct2d, freeze_batch_norm_2d

    model = freeze_batch_norm_2d(model)
    ours = {FrozenBatchNorm2d: FrozenNorm, FrozenBatchNormAct2d: FrozenNormAct}
    for part in model.modules():
        # They have the same buffers, and compute scale and shift at each step, in float32
        if norm := ours.get(type(part)):
            part.__class__ = norm
    return model


def _differ(a: Tensor, b: Tensor) -> bool:
    return a is not b
