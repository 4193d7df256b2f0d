"""The auxiliary heads of Co-DETR, from their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from detrellis.schemes.collaborative.atss import ATSS
from detrellis.schemes.collaborative.dense import DenseBranch
from detrellis.schemes.collaborative.fcos import FCOS
from detrellis.schemes.collaborative.gfl import GFL
from detrellis.schemes.collaborative.mask import MaskRCNN
from detrellis.schemes.collaborative.paa import PAA
from detrellis.schemes.collaborative.pyramid import Coarser, Pyramid
from detrellis.schemes.collaborative.rcnn import RCNN
from detrellis.schemes.collaborative.retinanet import RetinaNet
from detrellis.schemes.config import BranchName, RegionHead

DENSE: dict[BranchName, type[DenseBranch]] = {
    "atss": ATSS,
    "retinanet": RetinaNet,
    "fcos": FCOS,
    "paa": PAA,
    "gfl": GFL,
}


def build_branches(
    names: Sequence[BranchName],
    width: int,
    classes: int,
    strides: Sequence[int],
    *,
    convolutions: int,
    regions: RegionHead,
) -> tuple[Coarser | Pyramid, list[nn.Module]]:
    """The adapter that gives the branches their levels, and the branches;
    `strides` are those of the memory's levels.

    A width of 256 has the paper's 512 regions and 1024 hidden units, one of 128 a quarter of both.
    """
    adapter = Pyramid(width, strides[0]) if len(strides) == 1 else Coarser(width, strides)
    sizes = {"appended": 1, "samples": width**2 // 128, "hidden": width**2 // 64}
    options: dict[str, Any] = sizes | {"convolutional": regions == "convolutional"}
    makers: dict[BranchName, Callable[[], nn.Module]] = {
        "rcnn": partial(RCNN, width, classes, adapter.strides, **options),
        "mask": partial(MaskRCNN, width, classes, adapter.strides, **options),
    }
    for name, branch in DENSE.items():
        makers[name] = partial(
            branch, width, classes, len(adapter.strides), convolutions=convolutions
        )
    return adapter, [makers[name]() for name in names]
