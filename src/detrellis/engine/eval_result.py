"""What an evaluation says: COCO's statistics, by class too, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from detrellis.engine.console import number

Kind = Literal["box", "mask"]
COUNTED = 100  # detections of a class in an image, at most, that count in COCO's AP
STATISTICS = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)


@dataclass(frozen=True)
class ClassResult:
    """COCO's AP of one class. It is None where the class has no ground truth."""

    name: str
    id: int  # the data set's category id
    ap: float | None
    ap50: float | None
    ground_truth: int  # boxes, without crowd regions
    detections: int


@dataclass(frozen=True, kw_only=True)
class EvalScores:
    """What every metric reports:
    statistics in 0..1, None where one is undefined, and what they were computed from.
    """

    stats: Mapping[str, float | None]  # by name
    images: int  # that were evaluated
    images_in_set: int
    ground_truth: int  # boxes in the evaluated images that count
    detections: int
    dropped: int = 0  # detections with a number that was not finite

    @property
    def ap(self) -> float | None:
        """The main statistic of the metric."""
        return self.stats["AP"]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        data = asdict(self)
        return data | {"stats": dict(self.stats), "per_class": list(data["per_class"])}

    def caption(self, boxes: str) -> str:
        """What the statistics were computed from, as a table's caption;
        `boxes` says of how many boxes.
        """
        part = "" if self.images == self.images_in_set else f" of {self.images_in_set:,}"
        text = f"{self.images:,}{part} images, {boxes}, {self.detections:,} detections"
        return text + (
            f"; {self.dropped:,} detections were not finite and left out" if self.dropped else ""
        )


@dataclass(frozen=True, kw_only=True)
class EvalResult(EvalScores):
    """The twelve COCO statistics, by the names in `STATISTICS`, and each class's AP;
    crowd regions do not count.

    `ap` is over IoU 0.50:0.95. None where COCO has -1.
    """

    per_class: tuple[ClassResult, ...]  # in the order of class indices
    # Half of the 95 % interval of AP over images like these; None where they were not resampled
    ap_interval: float | None = None
    # AP of each resampling of the images, see `engine/bootstrap.py`; JSON has the interval alone
    resampled: tuple[float, ...] | None = None
    of: Kind = "box"  # whose IoU it is
    boxes: EvalResult | None = None  # box AP of the same detections, beside mask AP
    frequencies: Mapping[str, float | None] | None = None  # LVIS: `lvis_eval.NAMES`, and AP@1000
    # Boxes that COCO's AP counts as missed whatever is detected, see `coco_eval.py`
    beyond: int = 0
    # The page that says more, where one was written
    report: str | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it: with the interval, without what it was computed from."""
        data = super().to_dict()
        del data["resampled"]
        return data | {"boxes": None if self.boxes is None else self.boxes.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalResult:
        """The inverse of `to_dict`."""
        boxes = data.get("boxes")
        parts = {
            "per_class": tuple(ClassResult(**c) for c in data["per_class"]),
            "boxes": None if boxes is None else cls.from_dict(boxes),
        }
        return cls(**{**data, **parts})

    def table(self) -> Table:
        """A table of the twelve statistics for a rich console."""
        caption = self.caption(f"{self.ground_truth:,} boxes")
        if self.ap_interval is not None:
            caption += f"; AP \u00b1 {self.ap_interval:.3f} (95 %, over images)"
        if self.boxes is not None:
            caption += f"; box AP {number(self.boxes.ap)}"
        if self.beyond:
            caption += (
                f"; {self.beyond:,} boxes count as missed: COCO takes {COUNTED} detections of a "
                "class and image"
            )
        whose = "COCO" if self.frequencies is None else "LVIS"
        table = Table(
            title=f"{whose} {self.of} AP and AR",
            caption=caption,
            caption_justify="left",
            title_justify="left",
        )
        for name in STATISTICS[:6]:
            table.add_column(name, justify="right")
        below = {name: self.stats[name] for name in STATISTICS[6:]}
        below = below if self.frequencies is None else dict(list(self.frequencies.items())[:6])
        table.add_row(*(number(self.stats[name]) for name in STATISTICS[:6]), end_section=True)
        table.add_row(*(Text(name, "bold") for name in below))
        table.add_row(*map(number, below.values()))
        return table

    def class_table(self) -> Table:
        """A table with one row per class for a rich console."""
        title = "AP by class" if self.of == "box" else f"{self.of} AP by class"
        table = Table("class", title=title, title_justify="left")
        beside = () if self.boxes is None else ("box AP",)
        for name in ("AP", "AP50", *beside, "boxes", "detections"):
            table.add_column(name, justify="right")
        for k, c in enumerate(self.per_class):  # Text: a class may be called "[bold]"
            of_boxes = () if self.boxes is None else (number(self.boxes.per_class[k].ap),)
            counts = (str(c.ground_truth), str(c.detections))
            table.add_row(Text(c.name), number(c.ap), number(c.ap50), *of_boxes, *counts)
        return table
