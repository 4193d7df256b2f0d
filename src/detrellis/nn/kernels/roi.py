"""RoIAlign (He et al., 2017) of regions of several maps:
aligned, with as many samples in a cell as it has places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import ops

from detrellis.nn.kernels import roi_cpu
from detrellis.nn.order import at_hand


def roi_align(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    cells: int,
) -> Tensor:
    """`(R, cells, cells, D)`, in float32 or better, of regions `boxes (R, 4)` xyxy, not clipped.

    Each is read from its `level (R,)` of the `maps (B, D, H, W)` and its `image (R,)`. Boxes get no
    gradient. What is not a number counts as 0: the run then stops at its loss, with a message, and
    not here. On torch's meta device, where boxes have no numbers to sort by, only the shape comes
    out.
    """
    precise = torch.promote_types(maps[0].dtype, torch.float32)
    maps, boxes = [m.to(precise) for m in maps], boxes.detach().to(precise).nan_to_num()
    if boxes.is_meta:
        return maps[0].new_empty(len(boxes), cells, cells, maps[0].shape[1])
    read = roi_cpu.align if at_hand(boxes) else by_torchvision
    return read(maps, strides, boxes, image, level, cells)


def by_torchvision(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    cells: int,
) -> Tensor:
    """As `roi_cpu.align`, level by level; of one map nothing depends on data, as an exported graph
    needs it.
    """
    if len(maps) == 1:
        regions = torch.cat([image.to(boxes).unsqueeze(1), boxes], dim=1)
        read: Tensor = ops.roi_align(maps[0], regions, cells, 1 / strides[0], aligned=True)
        return read.permute(0, 2, 3, 1)
    images = len(maps[0])
    group = level * images + image
    order = group.argsort(stable=True)
    counts = torch.bincount(group, minlength=images * len(maps)).tolist()
    groups = boxes[order].split(counts)
    read = torch.cat(
        [
            ops.roi_align(
                m, list(groups[k * images : (k + 1) * images]), cells, 1 / stride, aligned=True
            )
            for k, (m, stride) in enumerate(zip(maps, strides, strict=True))
        ]
    )
    return torch.empty_like(read).index_copy(0, order, read).permute(0, 2, 3, 1)
