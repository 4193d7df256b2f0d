"""Images of a batch without their padding, to be measured in pixels and to be drawn: with their
boxes, and with values of an encoder's tokens as maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from detrellis.analysis.figures import Axes
from detrellis.boxes import cxcywh_to_xyxy
from detrellis.data.batch import Batch, Normalise
from detrellis.training import image_sizes
from detrellis.types import Memory

Size = tuple[int, int]  # height, width
SMALLEST = 1e-30  # a map that is 0 everywhere stays so


class Picture(NamedTuple):
    """An image without its padding, and the boxes in it."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    boxes: NDArray[np.float32]  # (n, 4) pixel xyxy


def image_size(batch: Batch, image: int) -> Size:
    """Height and width of one of a batch's images in pixels, without its padding."""
    height, width = image_sizes(batch.images)[image].tolist()
    return height, width


def image_boxes(batch: Batch, image: int) -> Tensor:
    """An image's target boxes `(n, 4)`, pixel `xyxy` in the image without its padding."""
    height, width = image_size(batch, image)
    boxes = cxcywh_to_xyxy(batch.targets.boxes.split(batch.targets.sizes)[image])
    return boxes * boxes.new_tensor([width, height, width, height])


def picture(batch: Batch, image: int, normalise: Normalise) -> Picture:
    """One of a batch's images, as the detector sees it;
    `normalise` is what its pixels went through.
    """
    height, width = image_size(batch, image)
    colours = normalise.colours(batch.images.pixels[image, :, :height, :width])
    return Picture(colours.movedim(0, -1).numpy(), image_boxes(batch, image).cpu().numpy())


def outline(axes: Axes, picture: Picture, colour: str = "white") -> None:
    """Draw the picture's boxes."""
    from matplotlib.patches import Rectangle

    for x1, y1, x2, y2 in picture.boxes.tolist():
        corner = (x1 - 0.5, y1 - 0.5)  # axes count from the centre of the first pixel
        axes.add_patch(
            Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=0.8)
        )


def levels(values: Tensor, memory: Memory, image: int) -> list[Tensor]:
    """One value a token of an image, `(S,)`, as a map `(h, w)` a level without its padding."""
    sizes = [height * width for height, width in memory.shapes]
    maps = [
        part.view(shape) for part, shape in zip(values.split(sizes), memory.shapes, strict=True)
    ]
    if memory.padding is None:
        return maps
    cut = []
    for level, padding in zip(maps, memory.padding[image].split(sizes), strict=True):
        inside = ~padding.view(level.shape)
        height, width = int(inside[:, 0].sum()), int(inside[0].sum())
        cut.append(level[:height, :width])
    return cut


def resized(level: Tensor, size: Size) -> Tensor:
    """`(h, w)` to `(H, W)`, bilinear between the centres of pixels."""
    return F.interpolate(level[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def attention_score(weights: Sequence[Tensor], size: Size) -> Tensor:
    """`(H, W)` with a maximum of 1 from each level's weights `(h, w)`: attention per pixel, so that
    a level counts as much as it is attended to, however coarse it is."""
    total = torch.stack([resized(level, size) * level.numel() for level in weights]).sum(0)
    return total / total.max().clamp(min=SMALLEST)
