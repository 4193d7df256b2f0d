"""Strong augmentation of one image at a fixed size:
SSD's zoom-out and crop (Liu et al., 2016), and small rotations.

Zoom-out and crop only choose a window of the picture, which may reach beyond its edges; it is
rendered once, so that no large canvas is made and no pixel is resampled twice. torchvision's
`RandomZoomOut` and `RandomIoUCrop` draw the same windows, the second one a trial at a time, which
takes longer than decoding the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from detrellis.boxes import pairwise_iou
from detrellis.data.operations import (
    CORNER,
    EDGE,
    MEAN_COLOUR,
    Picture,
    chance,
    choice,
    clip,
    crop,
    integer,
    place,
    resize,
    uniform,
)
from detrellis.data.transforms import FixedAugment, Resize

VISIBLE = 0.25  # a strong operation drops a box of which at most this fraction of the area is left,
SMALLEST = 1.0  # and one of which a side is shorter than this, in pixels of the final image
TRIALS = 40  # windows that are drawn at a time
SHORT_SIDES, CROP_SIDES = (400, 500, 600), (384, 600)  # of DETR's crop
# Of the window and a box, at least; 1: the whole picture
IOUS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


class Window(NamedTuple):
    """A part of a picture in its pixels;
    where it reaches beyond the picture it shows the mean colour.
    """

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class StrongAugment:
    """`fixed`, with zoom-out, crop and rotation before its flips and colours. What is zoomed out or
    cropped is not zoomed a second time. Probabilities, ranges, and the largest angle in degrees."""

    fixed: FixedAugment
    zoom_out: float = 0.0
    zoom_out_range: tuple[float, float] = (1.0, 4.0)
    iou_crop: float = 0.0
    iou_crop_range: tuple[float, float] = (0.3, 1.0)
    detr_crop: float = 0.0
    rotate: float = 0.0

    @property
    def pad_to(self) -> tuple[int, int] | None:
        """See `Resize`."""
        return self.fixed.pad_to

    @property
    def frame(self) -> Resize:
        """What fits a picture to its size."""
        return self.fixed.resize

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
        """The image in a window of it, rotated, flipped and recoloured; see `Transform`."""
        return self.finished(*self.framed(image, boxes, labels))

    def framed(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
        """The image before rotation, flips and colours."""
        image, boxes, labels = clip(image, boxes, labels)
        whole = window = Window(0, 0, *image.shape[1:])
        if self.zoom_out and chance(self.zoom_out):
            window = zoomed_out(window, self.zoom_out_range)
        if self.iou_crop and chance(self.iou_crop):
            window = cropped(window, boxes[labels >= 0], self.iou_crop_range)
        if self.detr_crop and chance(self.detr_crop):
            window = cropped_as_detr(window)
        if window == whole:
            return self.fixed.framed(image, boxes, labels)
        frame = self.frame.facing(whole.height, whole.width)
        return show((image, boxes, labels), window, frame.target(window.height, window.width))

    def finished(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
        """A framed image rotated, flipped and recoloured;
        its boxes clipped to it, and those that vanish dropped.
        """
        if self.rotate:
            image, boxes, labels = rotated(image, boxes, labels, uniform(-self.rotate, self.rotate))
        image, boxes, labels = clip(*self.fixed.finish(image, boxes), labels)
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(dim=1) | (labels < 0)
        return image, boxes[kept], labels[kept]


def zoomed_out(window: Window, sides: tuple[float, float]) -> Window:
    """A window whose sides are so many times as long,
    with the one given at a random place in it.
    """
    ratio = uniform(*sides)
    height, width = int(window.height * ratio), int(window.width * ratio)
    return Window(
        window.top - integer(0, height - window.height),
        window.left - integer(0, width - window.width),
        height,
        width,
    )


def cropped_as_detr(window: Window) -> Window:
    """DETR's crop of a window: rescaled so that its short side has one of `SHORT_SIDES` pixels,
    each side of the crop has `CROP_SIDES` of them, or as many as there are."""
    scale = min(window.height, window.width) / choice(SHORT_SIDES)
    sides = []
    for side in (window.height, window.width):
        low, high = (min(limit, max(int(side / scale), 1)) for limit in CROP_SIDES)
        sides.append(min(max(round(scale * integer(low, high)), 1), side))
    height, width = sides
    top, left = integer(0, window.height - height), integer(0, window.width - width)
    return Window(window.top + top, window.left + left, height, width)


def cropped(window: Window, boxes: Tensor, sides: tuple[float, float]) -> Window:
    """SSD's crop of a window: an IoU is drawn from `IOUS`, then windows, each side a fraction
    between `sides`, until one has the centre of a box in it and at least that IoU with it. The
    window given where there are no boxes."""
    size = torch.tensor([window.width, window.height])
    boxes = boxes - boxes.new_tensor([window.left, window.top, window.left, window.top])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    while len(boxes) and (least := choice(IOUS)) < 1:
        # Windows (TRIALS, 4), as corners in whole pixels.
        low, high = sides
        extent = ((low + (high - low) * torch.rand(TRIALS, 2)) * size).long().clamp(min=1)
        corner = ((size - extent) * torch.rand(TRIALS, 2)).long()
        windows = torch.cat([corner, corner + extent], dim=1).to(boxes.dtype)
        # Those that are no strips and have a box that counts.
        aspect = extent[:, 0] / extent[:, 1]
        inside = ((windows[:, None, :2] < centres) & (centres < windows[:, None, 2:])).all(dim=2)
        fitting = inside & (pairwise_iou(windows, boxes) >= least)
        good = fitting.any(dim=1) & (aspect >= 0.5) & (aspect <= 2)
        if good.any():
            first = int(good.nonzero()[0])
            (left, top), (width, height) = corner[first].tolist(), extent[first].tolist()
            return Window(window.top + top, window.left + left, height, width)
    return window


def show(
    picture: Picture, window: Window, frame: tuple[int, int], visible: float = VISIBLE
) -> Picture:
    """What the window shows, as an image of the size `frame`;
    a box of which at most the fraction `visible` of the area is in it is dropped."""
    height, width = picture[0].shape[1:]
    # The part of the window that is in the picture.
    top, left = max(window.top, 0), max(window.left, 0)
    bottom, right = min(window.top + window.height, height), min(window.left + window.width, width)
    image, boxes, labels = crop(*picture, (top, left, bottom - top, right - left), visible)
    # Its edges in the frame.
    scale = (frame[0] / window.height, frame[1] / window.width)
    upper, lower = (round((y - window.top) * scale[0]) for y in (top, bottom))
    first, last = (round((x - window.left) * scale[1]) for x in (left, right))
    upper, first = min(upper, frame[0] - 1), min(first, frame[1] - 1)
    image, boxes = resize(image, boxes, (max(lower - upper, 1), max(last - first, 1)))
    if image.shape[1:] != frame:
        image, boxes = place(image, boxes, frame, (upper, first))
    return image, boxes, labels


def rotated(image: Tensor, boxes: Tensor, labels: Tensor, degrees: float) -> Picture:
    """The picture turned about its centre, its size kept.

    A turned box is no box. Around its four corners a new one would be too large for all but objects
    that fill theirs to the corners; here an object counts as the ellipse in its box (Kalra et al.,
    2021), and the new box encloses that turned. For rectangles it is too small: a square's by 8 %
    at 5 degrees.
    """
    height, width = image.shape[1:]
    # Around 0, which is what lies beyond the edges: filled afterwards they would be seams.
    mean = torch.tensor(MEAN_COLOUR).view(3, 1, 1)
    pixels = F.rotate(image.float() - mean, degrees, InterpolationMode.BILINEAR) + mean
    image = pixels.round_().clamp_(0, 255).to(torch.uint8)
    # The centres, turned; on the screen y points down, so that the angle's sign is the other one.
    angle = -math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    middle = boxes.new_tensor([width, height]) / 2
    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2 - middle).unbind(dim=1)
    centres = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=1) + middle
    # Half the sides of the box around the turned ellipse.
    a, b = ((boxes[:, 2:] - boxes[:, :2]) / 2).unbind(dim=1)
    half = torch.stack([torch.hypot(a * cos, b * sin), torch.hypot(a * sin, b * cos)], dim=1)
    turned = torch.cat([centres - half, centres + half], dim=1)
    inside = turned.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    areas, before = ((corners[:, 2:] - corners[:, :2]).prod(dim=1) for corners in (inside, turned))
    # Points of the picture are turned and not clipped from here on: its edges are no longer those
    # of a box.
    points = labels < 0
    kept = (areas > VISIBLE * before) | points
    boxes, labels = turned.where(points.unsqueeze(1), inside), labels.where(labels != EDGE, CORNER)
    return image, boxes[kept], labels[kept]
