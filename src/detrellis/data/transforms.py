"""Image transforms: `(image, boxes, labels) -> (image, boxes, labels)`.

The image is uint8 `(3, H, W)` all the way: resizing uint8 is several times faster than resizing
floats and gives the same pixels to one level. Only `Resize` without antialiasing gives floats, for
checkpoints whose own processor does. Boxes are pixel `xyxy`. Random numbers come from
torch's global CPU generator, which the data set seeds anew for every image. Colours change after
the resize, where the fewest pixels are left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

from torch import Tensor

from detrellis.data.operations import (
    VISIBLE,
    Picture,
    chance,
    choice,
    clip,
    colour_jitter,
    horizontal_flip,
    integer,
    padded,
    photometric_distort,
    place,
    random_crop,
    resize,
    uniform,
    vertical_flip,
)
from detrellis.errors import UserError

Size = int | tuple[int, int]  # short side, or (height, width) of the padded image
Policy = Literal["detr", "fixed", "none"]
Sides = tuple[int, ...] | str  # a list, or all of a range such as "480-1536"


class Transform(Protocol):
    """What the data set applies to each image; `pad_to` is what the loader pads the result to."""

    @property
    def pad_to(self) -> tuple[int, int] | None:
        """`(height, width)` of every batch; None: the largest image of the batch decides."""

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
        """Image uint8 `(3, H, W)`, boxes `(n, 4)` pixel `xyxy`, labels `(n,)`;
        the same kinds come out.
        """


def train_transform(
    policy: Policy,
    size: Size,
    *,
    max_size: int | None = None,
    keep_aspect: bool = True,
    match_orientation: bool = False,
    hflip: float = 0.5,
    vflip: float = 0.0,
    jitter: float | None = None,
    zoom: tuple[float, float] | None = None,
    pad: int | None = None,
) -> Transform:
    """Training augmentation.

    `detr`: DETR's scale and crop augmentation for the short side `size`; everything is in its
    proportion to the paper's 800 (short sides 480 to 800, long side at most 1333, crops of 384 to
    600). `fixed`: every image is resized to fit one `(height, width)`, after a random zoom: the
    objects' magnification is drawn from `zoom` (default 0.8 to 1.25; above 1 a crop, below 1 a
    smaller image on a plain canvas). `none`: resize only, no randomness.

    `hflip` and `vflip` are probabilities, `jitter` is the strength of the colour jitter in [0, 1]
    (default: 0.2 for `fixed`, else 0). Two belong to a `(height, width)`: without `keep_aspect` the
    image is stretched to it instead of padded, with `match_orientation` a portrait is resized to
    fit a portrait of that size, and a landscape a landscape. `pad` is the grey level of padding
    that counts as a part of the image; None: the loader pads.
    """
    _check_size(size, max_size)
    _check_dials(policy, size, hflip=hflip, vflip=vflip, jitter=jitter, zoom=zoom)
    if policy == "detr":
        assert isinstance(size, int)
        return _detr(size, max_size, Finish(hflip, vflip, jitter or 0.0))
    resize = eval_transform(
        size,
        max_size=max_size,
        keep_aspect=keep_aspect,
        match_orientation=match_orientation,
        pad=pad,
    )
    if policy == "none":
        return resize
    return FixedAugment(
        resize, zoom or (0.8, 1.25), Finish(hflip, vflip, 0.2 if jitter is None else jitter)
    )


def eval_transform(
    size: Size,
    *,
    max_size: int | None = None,
    keep_aspect: bool = True,
    match_orientation: bool = False,
    exact_long: bool = False,
    antialias: bool = True,
    pad: int | None = None,
) -> Resize:
    """Resize only: short side `size` with the long side at most `max_size` (default: size * 1333 /
    800, DETR's proportion; `exact_long`: see `short_side_size`), or to a `(height, width)` as
    `train_transform` says, padded to it with the grey level `pad`."""
    _check_size(size, max_size)
    if isinstance(size, int) and max_size is None:
        max_size = round(size * 1333 / 800)
    return Resize(size, max_size, keep_aspect, match_orientation, exact_long, antialias, pad)


def _check_size(size: Size, max_size: int | None) -> None:
    sides = (size,) if isinstance(size, int) else size
    if min(sides) < 1 or (max_size is not None and max_size < 1):
        limit = "" if max_size is None else f", at most {max_size}"
        raise UserError(
            f"image size {size}{limit}", "Give a positive short side, or (height, width)."
        )


def _check_dials(
    policy: Policy,
    size: Size,
    *,
    hflip: float,
    vflip: float,
    jitter: float | None,
    zoom: tuple[float, float] | None,
) -> None:
    if policy not in get_args(Policy):
        raise UserError(f"augmentation `{policy}`", f"Choose one of {', '.join(get_args(Policy))}.")
    if policy == "detr" and not isinstance(size, int):
        raise UserError(
            f"augmentation `detr` with the fixed size {size}",
            "Give the short side, or use `fixed`.",
        )
    if policy == "fixed" and isinstance(size, int):
        raise UserError(
            f"augmentation `fixed` with the short side {size}",
            "Give (height, width), or use `detr`.",
        )
    if policy != "fixed" and zoom is not None:
        raise UserError(
            f"`zoom` with the augmentation `{policy}`", "Only `fixed` zooms; leave `zoom` out."
        )
    if zoom is not None and not 0 < zoom[0] <= zoom[1]:
        raise UserError(
            f"zoom {zoom}",
            "Give (lowest, highest) magnification, both positive, such as (0.8, 1.25).",
        )
    for name, value in (("hflip", hflip), ("vflip", vflip), ("jitter", jitter or 0.0)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} = {value}", "Give a number between 0 and 1.")


def short_side_size(
    height: int, width: int, size: int, max_size: int | None, *, exact_long: bool = False
) -> tuple[int, int]:
    """DETR's resize rule: short side `size` unless that makes the long side exceed `max_size`.

    The short side is then rounded, and the long one follows it, up to a pixel or two from
    `max_size`; with `exact_long` it follows the short side before rounding, as in transformers.
    """
    short, long = min(height, width), max(height, width)
    unrounded = float(size)
    if max_size is not None and long / short * size > max_size:
        unrounded = max_size * short / long
        size = round(unrounded)
    # A strip so thin that its short side vanishes keeps one row of pixels.
    other = int((unrounded if exact_long else size) * long / short) if size else max_size or long
    size = max(size, 1)
    return (size, other) if height <= width else (other, size)


@dataclass(frozen=True)
class Resize:
    """Resizes to one size, or one short side; the whole of the evaluation transform."""

    size: Size
    max_size: int | None = None
    keep_aspect: bool = True
    match_orientation: bool = False
    exact_long: bool = False
    antialias: bool = True  # False: the image is float32 from 0 to 255, see `resize`
    pad: int | None = None  # grey level of padding that is a part of the image; None: it is not

    @property
    def pad_to(self) -> tuple[int, int] | None:
        """The fixed `(height, width)` of every batch; None where the images of a batch decide."""
        return None if isinstance(self.size, int) or self.match_orientation else self.size

    def facing(self, height: int, width: int) -> Resize:
        """This resize for all that becomes a part of an image of that size,
        whatever their own orientation.
        """
        if isinstance(self.size, int) or not self.match_orientation:
            return self
        portrait = height > width
        short, long = sorted(self.size)
        return replace(
            self, size=(long, short) if portrait else (short, long), match_orientation=False
        )

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the resized image, before padding."""
        if isinstance(self.size, int):
            return short_side_size(
                height, width, self.size, self.max_size, exact_long=self.exact_long
            )
        if self.match_orientation:
            return self.facing(height, width).target(height, width)
        if not self.keep_aspect:
            return self.size
        fit = min(self.size[0] / height, self.size[1] / width)
        # max: a strip of an image keeps one row of pixels.
        return max(round(height * fit), 1), max(round(width * fit), 1)

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
        """The image resized, its boxes with it; see `Transform`."""
        image, boxes = resize(image, boxes, self.target(*image.shape[1:]), antialias=self.antialias)
        image, boxes, labels = clip(image, boxes, labels)
        if self.pad is not None:
            assert self.pad_to is not None
            image = padded(image, self.pad_to, self.pad)
        return image, boxes, labels

    def frame(self, height: int, width: int) -> tuple[float, float]:
        """What the boxes of an image of that size are relative to, in its pixels:
        the image, or with `pad` all that becomes the padded one."""
        if self.pad is None:
            return height, width
        assert self.pad_to is not None
        to = self.target(height, width)
        return self.pad_to[0] * height / to[0], self.pad_to[1] * width / to[1]


@dataclass(frozen=True)
class Finish:
    """The end of both augmentations: flips, then colours."""

    hflip: float = 0.5
    vflip: float = 0.0
    jitter: float = 0.0
    photometric: float = 0.0

    def __call__(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Image and boxes, flipped and recoloured."""
        if chance(self.hflip):
            image, boxes = horizontal_flip(image, boxes)
        if chance(self.vflip):
            image, boxes = vertical_flip(image, boxes)
        if self.photometric:
            image = photometric_distort(image, self.photometric)
        return colour_jitter(image, self.jitter) if self.jitter else image, boxes


@dataclass(frozen=True)
class DetrAugment:
    """DETR: one of several scales;
    half of the time a random crop of a rescaled image goes before it.
    """

    sides: tuple[int, ...]  # short sides to draw from
    max_size: int  # of the long side
    crop_sides: tuple[int, ...]  # short sides before the crop
    crop_range: tuple[int, int]  # of each side of the crop
    finish: Finish
    pad_to: None = None

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
        """The image cropped half of the time, resized, flipped and recoloured; see `Transform`."""
        if chance(0.5):
            height, width = image.shape[1:]
            image, boxes = resize(
                image, boxes, short_side_size(height, width, choice(self.crop_sides), None)
            )
            low, high = self.crop_range
            h, w = (integer(min(low, side), min(high, side)) for side in image.shape[1:])
            image, boxes, labels = random_crop(image, boxes, labels, h, w)
        to = short_side_size(image.shape[1], image.shape[2], choice(self.sides), self.max_size)
        image, boxes = resize(image, boxes, to)
        return clip(*self.finish(image, boxes), labels)


def _detr(size: int, max_size: int | None, finish: Finish) -> DetrAugment:
    def scaled(*sides: int) -> tuple[int, ...]:
        return tuple(max(round(side * size / 800), 1) for side in sides)

    low, high, longest = scaled(384, 600, 1333)
    return DetrAugment(
        scaled(*range(480, 801, 32)),
        max_size or longest,
        scaled(400, 500, 600),
        (low, high),
        finish,
    )


def detr_between(sides: Sides, longest: int | None, finish: Finish) -> DetrAugment:
    """DETR's augmentation with other short sides, of images whose long side is at most `longest`
    (default: DETR's proportion), and the paper's crops."""
    if isinstance(sides, str):
        low, high = map(int, sides.split("-"))
        sides = tuple(range(low, high + 1))
    return DetrAugment(
        sides, longest or round(max(sides) * 1333 / 800), (400, 500, 600), (384, 600), finish
    )


@dataclass(frozen=True)
class FixedAugment:
    """For small data at one size: a mild zoom in or out, flips, colour jitter."""

    resize: Resize
    zoom: tuple[float, float]
    finish: Finish

    @property
    def pad_to(self) -> tuple[int, int] | None:
        """See `Resize`."""
        return self.resize.pad_to

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
        """The image zoomed, resized, flipped and recoloured; see `Transform`."""
        image, boxes, labels = self.framed(image, boxes, labels)
        return clip(*self.finish(image, boxes), labels)

    def framed(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
        """The image zoomed and resized only."""
        height, width = image.shape[1:]
        frame = self.resize.target(height, width)
        low, high = (math.log(z) for z in self.zoom)
        zoom = math.exp(uniform(low, high))
        if zoom > 1:
            h, w = (max(round(side / zoom), 1) for side in (height, width))
            image, boxes, labels = random_crop(image, boxes, labels, h, w, VISIBLE)
        inner = (
            frame if zoom >= 1 else (max(round(frame[0] * zoom), 1), max(round(frame[1] * zoom), 1))
        )
        image, boxes = resize(image, boxes, inner)
        if inner != frame:
            corner = (integer(0, frame[0] - inner[0]), integer(0, frame[1] - inner[1]))
            image, boxes = place(image, boxes, frame, corner)
        return image, boxes, labels
