"""From backbone maps to a memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detrellis.errors import UserError
from detrellis.nn.neck import MapNorm, MultiScaleNeck
from detrellis.nn.position import SineMap


def test_a_map_that_its_norm_leaves_nothing_of_is_refused() -> None:
    """One image, one pixel, one channel a group: torch's own error names none of them."""
    neck = MultiScaleNeck([8], 32, 2, SineMap(32, temperature=20.0, offset=0.0))
    assert neck.project([torch.randn(1, 8, 4, 4)])[1].shape == (1, 32, 2, 2)
    with pytest.raises(UserError, match="1x1 pixels, with 32 channels in 32 groups") as error:
        neck.project([torch.randn(1, 8, 2, 2)])
    assert "data.size" in error.value.remedy
    assert "detector.width=64" in error.value.remedy


def test_the_norm_of_maps_is_group_norm() -> None:
    maps = torch.randn(1, 64, 1, 1)
    assert torch.equal(MapNorm(32, 64)(maps), nn.GroupNorm(32, 64)(maps))
