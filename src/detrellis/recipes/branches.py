"""The auxiliary heads of Co-DETR, from their names and the detector that they train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from detrellis.recipes.detector import DetectorConfig
from detrellis.schemes.collaborative.atss import ATSS
from detrellis.schemes.collaborative.dense import DenseBranch
from detrellis.schemes.collaborative.fcos import FCOS
from detrellis.schemes.collaborative.gfl import GFL
from detrellis.schemes.collaborative.mask import MaskRCNN
from detrellis.schemes.collaborative.paa import PAA
from detrellis.schemes.collaborative.pyramid import Coarser, Pyramid
from detrellis.schemes.collaborative.rcnn import RCNN
from detrellis.schemes.collaborative.retinanet import RetinaNet

DENSE: dict[str, type[DenseBranch]] = {"atss": ATSS, "retinanet": RetinaNet, "fcos": FCOS, "paa": PAA, "gfl": GFL}


def build_branches(
    config: DetectorConfig, classes: int, names: Sequence[str], convolutions: int
) -> tuple[Coarser | Pyramid, list[nn.Module]]:
    """The adapter that gives them their levels, and the branches.

    A width of 256 has the paper's 512 regions and 1024 hidden units, one of 128 a quarter of both.
    """
    adapter: Coarser | Pyramid
    if config.encoder.levels == 1:
        adapter = Pyramid(config.width, config.level_strides[-1])
    else:
        adapter = Coarser(config.width, config.level_strides)
    network = (config.width, classes)
    regions = {"appended": 1, "samples": config.width**2 // 128, "hidden": config.width**2 // 64}
    makers: dict[str, Callable[[], nn.Module]] = {
        "rcnn": partial(RCNN, *network, adapter.strides, **regions),
        "mask": partial(MaskRCNN, *network, adapter.strides, **regions),
        **{n: partial(m, *network, len(adapter.strides), convolutions=convolutions) for n, m in DENSE.items()},
    }
    return adapter, [makers[name]() for name in names]
