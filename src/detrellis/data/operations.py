"""What augmentations are made of: crops, flips and colours of one image, and the draws.

An image is uint8 `(3, H, W)`, boxes are pixel `xyxy`. Random numbers come from torch's global CPU
generator, which the data set seeds anew for every image.

A box with a label below 0 is no object but a point (x, y, x, y) of the picture. It is moved like
the boxes and never dropped; those labelled `EDGE` are clipped like them. Such points tell where the
picture went and what of it is left, which is all that masks need to know (`drawing.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

T = TypeVar("T")
# Image (3, H, W) uint8, boxes (n, 4) pixel xyxy, labels (n,)
Picture = tuple[Tensor, Tensor, Tensor]

# Of ImageNet, nearly 0 when normalised: what a zoomed-out image lies on
MEAN_COLOUR = (124, 116, 104)
# Labels of points; `PASTED` is a corner of what hides the objects before it
CORNER, EDGE, PASTED = -1, -2, -3
VISIBLE = 0.1  # a mild crop drops a box of which at most this fraction of the area is left


def horizontal_flip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Image `(3, H, W)` and boxes `(n, 4)` xyxy with left and right exchanged."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width = image.shape[-1]
    return image.flip(-1), torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def vertical_flip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Image `(3, H, W)` and boxes `(n, 4)` xyxy with top and bottom exchanged."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    height = image.shape[-2]
    return image.flip(-2), torch.stack([x1, height - y2, x2, height - y1], dim=-1)


def colour_jitter(image: Tensor, strength: float) -> Tensor:
    """Brightness, contrast and saturation times `1 +/- strength` and a hue turn of at most
    `strength * 36` degrees.
    """
    brightness, contrast, saturation = (uniform(1 - strength, 1 + strength) for _ in range(3))
    return recolour(
        image, brightness, contrast, saturation, uniform(-strength, strength) * math.pi / 5
    )


def photometric_distort(image: Tensor, probability: float) -> Tensor:
    """SSD's distortion (Liu et al., 2016), in torchvision's ranges: brightness, contrast,
    saturation and hue each with this probability, and with the same the channels in another
    order."""

    def drawn(low: float, high: float, otherwise: float) -> float:
        return uniform(low, high) if chance(probability) else otherwise

    brightness = drawn(0.875, 1.125, 1.0)
    contrast = drawn(0.5, 1.5, 1.0)
    saturation = drawn(0.5, 1.5, 1.0)
    turn = drawn(-0.05, 0.05, 0.0)
    image = recolour(image, brightness, contrast, saturation, turn * 2 * math.pi)
    return image[torch.randperm(3)] if chance(probability) else image


def recolour(
    image: Tensor, brightness: float, contrast: float, saturation: float, angle: float
) -> Tensor:
    """Three factors and a hue turn in radians, applied to a uint8 image.

    All four are linear in RGB (the hue turn is a rotation around the grey axis), so they are one
    3x3 matrix and one offset, many times faster than the four in turn. Whole numbers, so that no
    thread count changes a rounding.
    """
    grey = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    eye, third = torch.eye(3, dtype=torch.float64), torch.full((3, 3), 1 / 3, dtype=torch.float64)
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
    turn = math.cos(angle) * eye + math.sin(angle) * cross + (1 - math.cos(angle)) * third
    matrix = brightness * (saturation * eye + (1 - saturation) * grey.expand(3, 3)) @ turn
    mean = image.flatten(1).sum(dim=1).double() / image[0].numel()
    offset = (1 - contrast) * float(grey @ matrix @ mean)  # contrast pulls towards the mean grey
    # The matrix and the offset in units of 1 / 2**16, applied a channel at a time.
    weights = (contrast * matrix * 2**16).round().long().tolist()
    red, green, blue = image.int()
    out = torch.empty_like(image)
    for into, (r, g, b) in zip(out, weights, strict=True):
        mixed = (
            (red * r).add_(green, alpha=g).add_(blue, alpha=b).add_(round(offset * 2**16) + 2**15)
        )
        into.copy_((mixed >> 16).clamp_(0, 255))
    return out


def crop(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    window: tuple[int, int, int, int],
    visible: float = 0.0,
) -> Picture:
    """The `(top, left, height, width)` window. Boxes are clamped to it; those of which at most the
    fraction `visible` of the area is left are dropped (0: those that are outside)."""
    top, left, height, width = window
    image = image[:, top : top + height, left : left + width]
    before = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    boxes = boxes - boxes.new_tensor([left, top, left, top])
    image, boxes, labels, kept = _clip_and_tell(image, boxes, labels)
    enough = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) > visible * before[kept]
    enough |= labels < 0
    return image, boxes[enough], labels[enough]


def random_crop(
    image: Tensor, boxes: Tensor, labels: Tensor, height: int, width: int, visible: float = 0.0
) -> Picture:
    """A window of this size at a random place; see `crop`."""
    top, left = integer(0, image.shape[1] - height), integer(0, image.shape[2] - width)
    return crop(image, boxes, labels, (top, left, height, width), visible)


def place(
    image: Tensor, boxes: Tensor, frame: tuple[int, int], corner: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The image with its upper left corner at `(top, left)` of a plain canvas of the size
    `frame`.
    """
    (height, width), (top, left) = image.shape[1:], corner
    canvas = plain_canvas(frame)
    canvas[:, top : top + height, left : left + width] = image
    return canvas, boxes + boxes.new_tensor([left, top, left, top])


def padded(image: Tensor, frame: tuple[int, int], grey: int) -> Tensor:
    """The image in the upper left corner of a canvas of one grey level, of the size `frame`."""
    height, width = image.shape[1:]
    canvas = image.new_empty((*frame, 3)).permute(2, 0, 1)  # channels last, as images are
    canvas[:, :height, :width] = image
    canvas[:, :height, width:], canvas[:, height:] = grey, grey
    return canvas


def plain_canvas(frame: tuple[int, int]) -> Tensor:
    """An image `(3, height, width)` of the mean colour."""
    return torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(3, 1, 1).repeat(1, *frame)


def resize(
    image: Tensor, boxes: Tensor, to: tuple[int, int], *, antialias: bool = True
) -> tuple[Tensor, Tensor]:
    """Image and boxes stretched to `(height, width)`.

    Without `antialias` the image becomes float32, still from 0 to 255 and with all fractions: of
    those who resize so, each does it on floats.
    """
    height, width = image.shape[1:]
    if (height, width) == to:
        return image, boxes
    sx, sy = to[1] / width, to[0] / height
    resized = F.resize(image if antialias else image.float(), list(to), antialias=antialias)
    return resized, boxes * boxes.new_tensor([sx, sy, sx, sy])


def clip(image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
    """Boxes clamped to the image, the empty ones dropped."""
    return _clip_and_tell(image, boxes, labels)[:3]


def _clip_and_tell(
    image: Tensor, boxes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    height, width = image.shape[1:]
    clipped = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    points = labels < 0
    boxes = boxes.where((points & (labels != EDGE)).unsqueeze(1), clipped)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) | points
    return image, boxes[kept], labels[kept], kept


def uniform(low: float, high: float) -> float:
    """A number between the two."""
    return low + (high - low) * float(torch.rand(()))


def chance(probability: float) -> bool:
    """True with this probability."""
    return float(torch.rand(())) < probability


def integer(low: int, high: int) -> int:
    """Uniform, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def choice(values: Sequence[T]) -> T:
    """One of the values."""
    return values[integer(0, len(values) - 1)]
