"""The augmentation of a whole run:
strong for most of it, calm for the last epochs, and images mixed with others.

Mosaic, mixup and pasted boxes need partners. They are drawn from the same generator as everything
else, so that a sample stays a function of (seed, epoch, image index).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from detrellis.data.drawing import framed_object
from detrellis.data.lsj import LargeScale, LargeScaleJitter
from detrellis.data.operations import (
    Picture,
    chance,
    clip,
    integer,
    place,
    plain_canvas,
    random_crop,
    resize,
    uniform,
)
from detrellis.data.strong import VISIBLE, StrongAugment
from detrellis.data.transforms import DetrAugment, FixedAugment, Resize, Transform
from detrellis.errors import UserError

Partner = Callable[[], Picture]  # another image of the data set, drawn at random
STEP = 32  # pixels between the sizes of multi-scale training
USUAL = 3  # times as often as each other size is the recipe's own
MIDDLE = (0.35, 0.65)  # where a mosaic's four pictures meet, in fractions of its sides
PASTED = 3  # objects of another picture, at most
PLACES = 20  # that are tried for each
LEGIBLE = 8  # pixels of a pasted rectangle's short side, at least


@dataclass(frozen=True)
class Strong:
    """What is switched off for the last part of a run.
    Probabilities (0: off), and the ranges that are drawn from.
    """

    photometric: float = 0.0  # of each of SSD's changes of colour
    rotate: float = 0.0  # largest angle, in degrees
    zoom_out: float = 0.0
    zoom_out_range: tuple[float, float] = (1.0, 4.0)  # sides of the canvas, in sides of the picture
    iou_crop: float = 0.0
    iou_crop_range: tuple[float, float] = (0.3, 1.0)  # sides of the crop, in sides of the picture
    detr_crop: float = 0.0
    mosaic: float = 0.0
    mosaic_range: tuple[float, float] = (0.5, 1.0)  # magnification of its four pictures
    mixup: float = 0.0
    mixup_range: tuple[float, float] = (0.45, 0.55)  # weight of the first picture
    copy_paste: float = 0.0
    multi_scale: tuple[float, float] = (1.0, 1.0)  # sides of a batch, in the recipe's


@dataclass(frozen=True)
class Mixing:
    """One image through its strong augmentation, alone,
    as a part of a mosaic, or blended with another.
    """

    each: StrongAugment
    strong: Strong

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor, *, partner: Partner
    ) -> Picture:
        """The image with what is mixed into it; see `Transform`."""
        mixed = self._one((image, boxes, labels), partner)
        if self.strong.mixup and chance(self.strong.mixup):
            mixed = blended(mixed, self._one(partner(), partner), uniform(*self.strong.mixup_range))
        return mixed

    def _one(self, picture: Picture, partner: Partner) -> Picture:
        if self.strong.mosaic and chance(self.strong.mosaic):
            pictures = [picture, *(partner() for _ in range(3))]
            frame = self.each.frame.facing(*picture[0].shape[1:])
            return self.each.finished(*mosaic(pictures, frame, self.strong.mosaic_range))
        picture = self.each.framed(*picture)
        if self.strong.copy_paste and chance(self.strong.copy_paste):
            picture = pasted(picture, self.each.framed(*partner()))
        return self.each.finished(*picture)


@dataclass(frozen=True)
class Augmentation:
    """What an image goes through in each epoch:
    one of `strong` before epoch `until`, `calm` from there on.

    Each of `strong` makes another size; the data set draws one for a batch.
    """

    calm: Transform
    strong: tuple[Mixing | Transform, ...] = ()
    until: int = 0

    @property
    def pad_to(self) -> tuple[int, int] | None:
        """`(height, width)` of every batch; None: the largest image of the batch decides."""
        return self.calm.pad_to if len(self.strong) < 2 else None

    @property
    def large_scale(self) -> LargeScale | None:
        """What large-scale jitter draws; None where it is another augmentation."""
        return self.calm.options if isinstance(self.calm, LargeScaleJitter) else None

    def choices(self, epoch: int) -> int:
        """How many sizes there are to draw from."""
        return len(self.strong) if epoch < self.until else 1

    def at(
        self, epoch: int, choice: int, partner: Partner
    ) -> Callable[[Tensor, Tensor, Tensor], Picture]:
        """The transform of an image of this epoch."""
        if epoch >= self.until:
            return self.calm
        transform = self.strong[choice]
        return partial(transform, partner=partner) if isinstance(transform, Mixing) else transform


def augmentation(usual: Transform, strong: Strong, *, epochs: int, calm: float) -> Augmentation:
    """The augmentation of a run of so many epochs, of which the last `calm` (a fraction) go without
    what `strong` adds to the `usual` one. Only at one `(height, width)` there is more to add than
    colours."""
    if strong == Strong():
        return Augmentation(usual)
    until = math.ceil(epochs * (1 - calm) - 1e-9)  # what is left by rounding is no epoch
    if isinstance(usual, FixedAugment):
        return Augmentation(
            usual,
            tuple(_mixing(usual, strong, size) for size in _sizes(usual.resize, strong)),
            until,
        )
    if strong != Strong(photometric=strong.photometric) or not isinstance(usual, DetrAugment):
        raise UserError(
            "strong augmentation needs one size", "Give (height, width), and the policy `fixed`."
        )
    return Augmentation(
        usual,
        (replace(usual, finish=replace(usual.finish, photometric=strong.photometric)),),
        until,
    )


def _mixing(usual: FixedAugment, strong: Strong, size: tuple[int, int]) -> Mixing:
    finish = replace(usual.finish, photometric=strong.photometric)
    fixed = replace(usual, resize=replace(usual.resize, size=size), finish=finish)
    names = ("zoom_out_range", "iou_crop", "iou_crop_range", "detr_crop", "rotate")
    crops = {name: getattr(strong, name) for name in names}
    return Mixing(StrongAugment(fixed, strong.zoom_out, **crops), strong)


def _sizes(resize: Resize, strong: Strong) -> list[tuple[int, int]]:
    """The sizes of multi-scale training as RT-DETR draws them:
    multiples of 32 pixels, the usual one more often.
    """
    assert isinstance(resize.size, tuple)
    (height, width), (low, high) = resize.size, strong.multi_scale
    if low == high == 1:
        return [resize.size]
    widths = range(math.ceil(low * width / STEP) * STEP, math.floor(high * width) + 1, STEP)
    others = [
        (max(round(height * side / width / STEP), 1) * STEP, side)
        for side in widths
        if side != width
    ]
    return [*others, *[resize.size] * USUAL]


def mosaic(pictures: Sequence[Picture], frame: Resize, zoom: tuple[float, float]) -> Picture:
    """Four pictures around a point in the middle of an image of the frame's size (Bochkovskiy et
    al., 2020).

    Each shows a window of itself at a magnification between those of `zoom`, relative to the
    picture resized alone, or higher where the window would reach beyond it: no canvas shows. A box
    of which at most the fraction `VISIBLE` of the area is in the window is dropped.
    """
    assert isinstance(frame.size, tuple)
    height, width = frame.size
    canvas = plain_canvas(frame.size)
    middle, centre = round(height * uniform(*MIDDLE)), round(width * uniform(*MIDDLE))
    boxes, labels = [], []
    rows, columns = ((0, middle), (middle, height)), ((0, centre), (centre, width))
    for picture, ((top, bottom), (left, right)) in zip(
        pictures, itertools.product(rows, columns), strict=True
    ):
        image, moved, kinds = _window_of(
            picture, frame, (bottom - top, right - left), uniform(*zoom)
        )
        canvas[:, top:bottom, left:right] = image
        boxes.append(moved + moved.new_tensor([left, top, left, top]))
        labels.append(kinds)
    return canvas, torch.cat(boxes), torch.cat(labels)


def _window_of(picture: Picture, frame: Resize, cell: tuple[int, int], zoom: float) -> Picture:
    """A window of a picture that fills a cell, at a random place."""
    size = picture[0].shape[1:]
    alone = frame.target(*size)
    zoom = max(zoom, cell[0] / alone[0], cell[1] / alone[1])
    height, width = (
        min(max(round(side * c / (a * zoom)), 1), side)
        for side, c, a in zip(size, cell, alone, strict=True)
    )
    image, boxes, labels = random_crop(*picture, height, width, VISIBLE)
    image, boxes = resize(image, boxes, cell)
    return image, boxes, labels


def blended(one: Picture, other: Picture, weight: float) -> Picture:
    """Mixup for detection (Zhang et al., 2019):
    the pixels of both, `weight` of the first one, and all boxes.

    The smaller one lies on the mean colour.
    """
    height, width = (max(a, b) for a, b in zip(one[0].shape[1:], other[0].shape[1:], strict=True))
    first, second = (
        image
        if image.shape[1:] == (height, width)
        else place(image, boxes, (height, width), (0, 0))[0]
        for image, boxes, _ in (one, other)
    )
    # In whole numbers, which no thread count rounds otherwise.
    parts = round(weight * 256)  # of 256
    mixed = (first.int() * parts).add_(second, alpha=256 - parts).add_(128) >> 8
    return mixed.to(torch.uint8), torch.cat([one[1], other[1]]), torch.cat([one[2], other[2]])


def pasted(picture: Picture, other: Picture) -> Picture:
    """A few objects of another picture, each the rectangle of its box,
    laid where they hide little of what is there.
    """
    image, boxes, labels = picture
    source, theirs, kinds = clip(*other)
    points, theirs, kinds = theirs[kinds < 0], theirs[kinds >= 0], kinds[kinds >= 0]
    height, width = image.shape[1:]
    image = image.clone()
    for row in torch.randperm(len(theirs))[: integer(1, PASTED)].tolist():
        # The rectangle in whole pixels, and places for it.
        x1, y1 = theirs[row, :2].floor().int().tolist()
        x2, y2 = theirs[row, 2:].ceil().int().tolist()
        room = torch.tensor([width - (x2 - x1), height - (y2 - y1)])
        if room.min() < 0 or min(x2 - x1, y2 - y1) < LEGIBLE:
            continue
        corners = (torch.rand(PLACES, 2) * (room + 1)).long()
        places = torch.cat([corners, corners + corners.new_tensor([x2 - x1, y2 - y1])], dim=1).to(
            boxes.dtype
        )
        # The first one that hides no object by more than what a crop may take of it.
        there = boxes[labels >= 0]
        overlap = torch.minimum(places[:, None, 2:], there[:, 2:]) - torch.maximum(
            places[:, None, :2], there[:, :2]
        )
        hidden = overlap.clamp(min=0).prod(dim=2) / (there[:, 2:] - there[:, :2]).prod(dim=1)
        free = (hidden <= VISIBLE).all(dim=1).nonzero()
        if not len(free):
            continue
        left, top = corners[int(free[0])].tolist()
        image[:, top : top + y2 - y1, left : left + x2 - x1] = source[:, y1:y2, x1:x2]
        shift = theirs.new_tensor([left - x1, top - y1, left - x1, top - y1])
        new, kind = theirs[row : row + 1], kinds[row : row + 1]
        if len(points):
            new, kind = framed_object(points, new, kind, (x1, y1, x2, y2))
        boxes, labels = torch.cat([boxes, new + shift]), torch.cat([labels, kind])
    return image, boxes, labels
