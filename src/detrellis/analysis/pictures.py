"""Images of a batch without their padding, with their boxes: to be measured in pixels, and to be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.data.loader import MEAN, STD, Batch
from detrellis.training import image_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Size = tuple[int, int]  # height, width


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


def picture(batch: Batch, image: int) -> Picture:
    """One of a batch's images, as the detector sees it."""
    height, width = image_size(batch, image)
    pixels = batch.images.pixels[image, :, :height, :width].cpu().movedim(0, -1)
    colours = ((pixels * torch.tensor(STD) + torch.tensor(MEAN)) * 255).round().clamp(0, 255).byte()
    return Picture(colours.numpy(), image_boxes(batch, image).cpu().numpy())


def outline(axes: Axes, picture: Picture, colour: str = "white") -> None:
    """Draw the picture's boxes."""
    from matplotlib.patches import Rectangle

    for x1, y1, x2, y2 in picture.boxes.tolist():
        corner = (x1 - 0.5, y1 - 0.5)  # axes count from the centre of the first pixel
        axes.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=0.8))
