"""The part of a recipe that says which pictures are seen: their size and their augmentation."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from detrellis.fields import Config, ZeroToOne, within

Side = Annotated[int, within(1, 16384)]  # of a picture, in pixels
PositiveFraction = Annotated[float, within(0, 1, above=True)]
Channels = tuple[ZeroToOne, ZeroToOne, ZeroToOne]  # red, green, blue
Deviation = Annotated[float, within(0, 1, above=True)]
Magnification = Annotated[float, within(0, 10, above=True)]
Enlargement = Annotated[float, within(1, 10)]
Angle = Annotated[float, within(0, 45)]  # in degrees


def _size(value: Any) -> Any:
    sides = (
        [value]
        if isinstance(value, int)
        else list(value)
        if isinstance(value, list | tuple)
        else []
    )
    numbers = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if (
        numbers
        and len(sides) == (1 if isinstance(value, int) else 2)
        and all(1 <= side <= 16384 for side in sides)
    ):
        return value if isinstance(value, int) else tuple(sides)
    raise PydanticCustomError(
        "size",
        (
            "has to be the short side, such as 640, or [height, width], such as [480, 640], "
            "each at most 16384"
        ),
    )


def _lowest_first(zoom: tuple[float, float]) -> tuple[float, float]:
    if zoom[0] > zoom[1]:
        raise PydanticCustomError("order", "has to be [lowest, highest], such as [0.8, 1.25]")
    return zoom


def _sides(value: Any) -> Any:
    if isinstance(value, str) and (
        match := re.fullmatch(r"(\d{1,5}) *- *(\d{1,5})", value.strip())
    ):
        low, high = map(int, match.groups())
        if 1 <= low <= high <= 16384:
            return f"{low}-{high}"
    sides = list(value) if isinstance(value, list | tuple) else []
    if sides and all(
        isinstance(s, int) and not isinstance(s, bool) and 1 <= s <= 16384 for s in sides
    ):
        return tuple(sides)
    raise PydanticCustomError(
        "sides", 'has to be a list such as [480, 512, 544], or a range such as "480-1536"'
    )


Size = Annotated[int | tuple[int, int], BeforeValidator(_size)]
Sides = Annotated[tuple[int, ...] | str, BeforeValidator(_sides)]
Grey = Annotated[int, within(0, 255)]
Zoom = Annotated[tuple[Magnification, Magnification], AfterValidator(_lowest_first)]
Enlarging = Annotated[tuple[Enlargement, Enlargement], AfterValidator(_lowest_first)]
Fractions = Annotated[tuple[PositiveFraction, PositiveFraction], AfterValidator(_lowest_first)]


class DataConfig(Config):
    """Image size and augmentation; `size`: short side, or (height, width).

    The policy `augment` sets what is None below: `small` and `realtime` are `fixed` with other
    values of these, and everywhere else strong augmentation is off.
    """

    size: Size = 800
    # Of the long side where size is the short one; None: size * 1333 / 800
    max_side: Side | None = None
    # Short sides that augment=detr draws: a list, or a range "480-1536"; None: by size
    sides: Sides | None = None
    sides_max: Side | None = None  # of the long side of those; None: max_side
    # Round a long side that meets its limit as transformers does, when not augmenting
    exact_long: bool = False
    # Make pictures smaller with antialiasing; False: without, and unrounded, when not augmenting
    antialias: bool = True
    augment: Literal["detr", "fixed", "small", "realtime", "lsj", "none"] = "detr"
    # Large-scale jitter's: Co-DETR's, or ViTDet's
    lsj_style: Literal["mmdet", "detectron2"] = "mmdet"
    lsj_range: Zoom = (0.1, 2.0)  # of its sizes, in sides of the square
    # Grey level of padding that is a part of the picture; None: it is masked
    pad: Grey | None = None
    keep_aspect: bool = True
    match_orientation: bool = False  # turn a (height, width) to the orientation of each picture
    hflip: ZeroToOne = 0.5
    vflip: ZeroToOne = 0.0
    jitter: ZeroToOne | None = None  # strength of the colour jitter; None: the policy's own
    zoom: Zoom | None = None  # lowest and highest magnification; None: the policy's own
    # Strong augmentation: probabilities, and the ranges that are drawn from; None: the policy's
    # own.
    photometric: ZeroToOne | None = None  # of each of SSD's changes of colour
    rotate: Angle | None = None  # largest angle
    zoom_out: ZeroToOne | None = None
    zoom_out_range: Enlarging = (1.0, 4.0)  # sides of the canvas, in sides of the picture
    iou_crop: ZeroToOne | None = None
    iou_crop_range: Fractions = (0.3, 1.0)  # sides of the crop, in sides of the picture
    detr_crop: ZeroToOne | None = None  # DETR's crop, which augment=detr has anyway, at one size
    mosaic: ZeroToOne | None = None
    mosaic_range: Zoom = (0.5, 1.0)  # magnification of its four pictures
    mixup: ZeroToOne | None = None
    mixup_range: Fractions = (0.45, 0.55)  # weight of the first of two pictures
    # Of objects of another picture: rectangles; with augment=lsj, by their masks
    copy_paste: ZeroToOne | None = None
    multi_scale: Zoom | None = None  # smallest and largest size of a batch, in sides of the size
    calm: ZeroToOne = 0.15  # last part of the run that goes without strong augmentation
    # of each channel, of pixels from 0 to 1; None: the backbone's own, which a run that starts
    # writes here
    mean: Channels | None = None
    std: tuple[Deviation, Deviation, Deviation] | None = None
    # images of classes that are in less than this fraction of the images are seen several times
    # (LVIS: 0.001); 0: off
    repeat_threshold: ZeroToOne = 0.0
    group_by_aspect: bool = False  # batches of one orientation, which saves padding
    masks: bool = False  # draw each object's mask in the whole image
    # a picture that cannot be read stops training, or the next one is seen instead, and the run
    # goes on
    unreadable: Literal["stop", "replace"] = "stop"

    def resizing(self) -> dict[str, Any]:
        """The arguments of `eval_transform` besides the size."""
        return self._resizing() | {"exact_long": self.exact_long, "antialias": self.antialias}

    def statistics(self) -> dict[str, tuple[float, float, float] | None]:
        """The arguments of `Normalise.of`."""
        return {"mean": self.mean, "std": self.std}

    def usual(self) -> dict[str, Any]:
        """The arguments of `train_transform`."""
        policy = "fixed" if self.augment in POLICIES else self.augment
        flips = {"hflip": self.hflip, "vflip": self.vflip}
        drawn = {"jitter": self._or_own("jitter"), "zoom": self._or_own("zoom")}
        return {"policy": policy, "size": self.size} | self._resizing() | flips | drawn

    def large_scale(self) -> dict[str, Any]:
        """The arguments of `LargeScale`."""
        return {
            "style": self.lsj_style,
            "scales": self.lsj_range,
            "copy_paste": self.copy_paste or 0.0,
        }

    @property
    def pastes(self) -> bool:
        """Whether objects are pasted by their masks."""
        return self.augment == "lsj" and bool(self.copy_paste)

    def _resizing(self) -> dict[str, Any]:
        names = ("keep_aspect", "match_orientation", "pad")
        return {"max_size": self.max_side} | {name: getattr(self, name) for name in names}

    def strong(self) -> dict[str, Any]:
        """What the calm part of a run goes without; only what is on, and the ranges."""
        values = {name: self._or_own(name) for name in STRONG}
        if self.augment == "lsj":  # which pastes to the end
            values["copy_paste"] = None
        ranges = {
            f"{name}_range": getattr(self, f"{name}_range") for name in RANGED if values[name]
        }
        return {name: value for name, value in values.items() if value} | ranges

    def _or_own(self, name: str) -> Any:
        """The field, or what the policy has where it is None."""
        given = getattr(self, name)
        return POLICIES.get(self.augment, {}).get(name) if given is None else given


STRONG = (
    "photometric",
    "rotate",
    "zoom_out",
    "iou_crop",
    "detr_crop",
    "mosaic",
    "mixup",
    "copy_paste",
    "multi_scale",
)
RANGED = ("zoom_out", "iou_crop", "mosaic", "mixup")  # those with a field of their range
# What policies set beside `fixed`'s own values; RT-DETR's (Zhao et al., 2024) as in its code.
POLICIES: dict[str, dict[str, Any]] = {
    "small": {"mosaic": 0.5, "mixup": 0.2},
    "realtime": {
        "photometric": 0.5,
        "zoom_out": 0.5,
        "iou_crop": 0.8,
        "multi_scale": (0.75, 1.25),
        "jitter": 0.0,
        "zoom": (1.0, 1.0),
    },
}
