"""Large-scale jitter (Ghiasi et al., 2021):
an image at 0.1 to 2 times the size of a square, cut to it or padded.

`mmdet` is Co-DETR's, `detectron2` that of ViTDet and Mask2Former. They differ in rounding, in the
draws of the crop, and in whether flips come before or after it.

| deviation from the released codes | why |
| --- | --- |
| a side keeps at least one pixel | resizing fails without |
| an image whose objects are all cut away stays | Co-DETR's draws another one: a sample is a function of its image |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from detrellis.data.operations import Picture, crop, integer, padded, resize, uniform

Style = Literal["mmdet", "detectron2"]
Extent = tuple[int, int]  # height, width
SMALLEST = 0.01  # pixels of a box's side, more or it is dropped


@dataclass(frozen=True)
class LargeScale:
    """What large-scale jitter draws: its style, the range of sizes in sides of the square, and how
    probably objects of another picture are pasted by their masks."""

    style: Style = "mmdet"
    scales: tuple[float, float] = (0.1, 2.0)
    copy_paste: float = 0.0


def resized_extent(height: int, width: int, side: int, scale: float, style: Style) -> Extent:
    """Height and width of an image whose long side becomes `scale` times the square's `side`."""
    if style == "mmdet":
        factor = int(side * scale) / max(height, width)
        return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)
    factor = min(side * scale / height, side * scale / width)
    return max(round(height * factor), 1), max(round(width * factor), 1)


def kept_extent(resized: Extent, side: int) -> Extent:
    """What of it fits into the square."""
    return min(resized[0], side), min(resized[1], side)


def shared_offset(resized: Extent, side: int, draw: float) -> Extent:
    """detectron2's corner of the crop: one draw from [0, 1) for both axes."""
    top, left = (
        round((whole - kept) * draw)
        for whole, kept in zip(resized, kept_extent(resized, side), strict=True)
    )
    return top, left


@dataclass(frozen=True)
class LargeScaleJitter:
    """The transform: a square of `side` pixels, or what the image fills of it where `pad` is None.

    `pad` is the grey level of padding that counts as a part of the image. `finish` flips and
    recolours.
    """

    side: int
    options: LargeScale
    finish: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    pad: int | None = None

    @property
    def pad_to(self) -> Extent:
        """The square."""
        return self.side, self.side

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
        """The image resized, cut, flipped, recoloured and padded; see `Transform`."""
        first = self.options.style == "detectron2"
        if first:
            image, boxes = self.finish(image, boxes)
        scale = uniform(*self.options.scales)
        resized = resized_extent(
            image.shape[1], image.shape[2], self.side, scale, self.options.style
        )
        image, boxes = resize(image, boxes, resized)
        image, boxes, labels = crop(
            image, boxes, labels, (*self._corner(resized), *kept_extent(resized, self.side))
        )
        legible = ((boxes[:, 2:] - boxes[:, :2]) > SMALLEST).all(dim=1) | (labels < 0)
        boxes, labels = boxes[legible], labels[legible]
        if not first:
            image, boxes = self.finish(image, boxes)
        return (image if self.pad is None else padded(image, self.pad_to, self.pad)), boxes, labels

    def _corner(self, resized: Extent) -> Extent:
        if self.options.style == "detectron2":
            return shared_offset(resized, self.side, uniform(0, 1))
        height, width = kept_extent(resized, self.side)
        return integer(0, resized[0] - height), integer(0, resized[1] - width)
