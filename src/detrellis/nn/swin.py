"""Swin Transformers as detectors have them:
a map that its windows do not fill is padded before they are shifted.

timm's pads what it has shifted, and so sees other windows at the edges of such a map than what was
trained.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn


class PaddedBlock(SwinTransformerBlock):
    """timm's block, which gets whole windows."""

    def _attn(self, x: Tensor) -> Tensor:
        """The attention of windows of `x (B, h, w, C)`, `(B, h, w, C)`."""
        height, width = x.shape[1:3]
        rows, columns = (
            -side % window for side, window in zip((height, width), self.window_size, strict=True)
        )
        attend: Any = super()._attn
        attended: Tensor = attend(F.pad(x, (0, 0, 0, columns, 0, rows)))
        return attended[:, :height, :width].contiguous()


def pad_before_shifting(model: nn.Module) -> None:
    """Let the blocks of a Swin do so; they keep everything else."""
    for module in model.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = PaddedBlock
