"""Pascal VOC's mean AP at IoU 0.5 (Everingham et al., IJCV 2010 and 2015),
from what a `CocoEvaluator` has collected.

The detections of a class are taken from the highest score down. Each belongs to the box of its
image and class with which its IoU is highest. Below 0.5 it is a false alarm; else the first one
finds the box, and all others are false alarms, even where another box would be free. Boxes marked
`difficult` are not counted as missed, and detections that belong to one count neither way. AP is
the area under the precision envelope (VOC 2010 on), and the mean of the envelope at the recalls 0,
0.1, ..., 1 (VOC 2007).

| deviation from VOC's development kit | why |
| --- | --- |
| boxes are continuous; the kit's are of whole pixels, whose widths and heights are `max - min + 1` | see below |
| the best `top_k` detections of an image | what the detector gives |
| equal scores rank by image, then as the detector does | the kit ranks by the order in its results file |
| recall 0.3 is reached by 3 boxes of 10 | in the kit's floating point some such steps fall short |
| a class without a box has no AP, and no part in the mean | the kit divides by 0 |
| crowd regions (COCO) count as difficult | VOC has none |

VOC's files are read as edges, `xmin - 1 .. xmax` (data/formats/voc.py), so a box has the kit's
size. If detections are written for the kit as `x1 + 1 .. x2`, its IoU is ours. In sets of other
formats, and in those counted from 0, it would see all boxes a pixel larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from detrellis.boxes import iou, ragged
from detrellis.data.annotations import Annotations
from detrellis.engine.coco_eval import ResultArrays
from detrellis.engine.console import number
from detrellis.engine.eval_result import EvalScores
from detrellis.engine.means import mean_of_known

THRESHOLD = 0.5  # of the IoU
STATISTICS = {"AP": "AP, area", "AP11": "AP, 11 points"}  # and what tables call them

Bool = NDArray[np.bool_]
Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class VocClassResult:
    """VOC's AP of one class. Both are None where the class has no box that counts."""

    name: str
    id: int  # the data set's category id
    ap: float | None  # area
    ap11: float | None  # 11 points
    ground_truth: int  # boxes that count
    difficult: int  # boxes that do not
    detections: int  # those of difficult boxes included


@dataclass(frozen=True, kw_only=True)
class VocResult(EvalScores):
    """Mean AP at IoU 0.5 over the classes,
    in both of VOC's versions (`STATISTICS`), and each class's.

    `ap` is the mean of the areas.
    """

    per_class: tuple[VocClassResult, ...]  # in the order of class indices
    difficult: int

    @property
    def ap11(self) -> float | None:
        """The mean over the classes of the 11-point averages."""
        return self.stats["AP11"]

    def table(self) -> Table:
        """A table of both means for a rich console."""
        look: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
        caption = self.caption(f"{self.ground_truth:,} boxes and {self.difficult:,} difficult ones")
        table = Table(title="VOC mean AP at IoU 0.5", caption=caption, **look)
        for title in STATISTICS.values():
            table.add_column(title, justify="right")
        table.add_row(*(number(self.stats[name]) for name in STATISTICS))
        return table

    def class_table(self) -> Table:
        """A table with one row per class for a rich console."""
        table = Table("class", title="AP at IoU 0.5 by class", title_justify="left")
        for title in (*STATISTICS.values(), "boxes", "difficult", "detections"):
            table.add_column(title, justify="right")
        for c in self.per_class:  # Text: a class may be called "[bold]"
            counts = map(str, (c.ground_truth, c.difficult, c.detections))
            table.add_row(Text(c.name), number(c.ap), number(c.ap11), *counts)
        return table


def evaluate_voc(annotations: Annotations, collected: ResultArrays) -> VocResult:
    """VOC's metric over the images that were shown, with the detections of all processes."""
    a, count = annotations, len(annotations.classes)
    # The ground truth of the images that were shown, and all detections, best first.
    image = a.box_rows
    shown = np.isin(image, collected.images)
    image, labels, boxes = image[shown], a.labels[shown], a.boxes[shown]
    difficult = (a.crowd if a.difficult is None else a.crowd | a.difficult)[shown]
    rows = collected.rows
    rows = rows[np.lexsort((rows[:, 0], -rows[:, 5]))]
    row_image, row_label = (rows[:, i].astype(np.int64) for i in (0, 6))
    matched = match_boxes(
        row_image * count + row_label, rows[:, 1:5], image * count + labels, boxes
    )
    # Detections of difficult boxes count neither way; of several that found one box, only the first
    # is a hit.
    counts = ~np.append(difficult, False)[matched]  # -1, no box, is the last
    first = np.zeros(len(matched), dtype=np.bool_)
    first[np.unique(matched, return_index=True)[1]] = True
    hits = first & (matched >= 0)
    per_class = []
    for k, (name, category) in enumerate(zip(a.classes.names, a.classes.ids, strict=True)):
        truth, detected = labels == k, row_label == k
        total, passed = int((truth & ~difficult).sum()), int((truth & difficult).sum())
        ap, ap11 = average_precision(hits[detected & counts], total)
        per_class.append(
            VocClassResult(name, category, ap, ap11, total, passed, int(detected.sum()))
        )
    return VocResult(
        stats={
            "AP": mean_of_known(c.ap for c in per_class),
            "AP11": mean_of_known(c.ap11 for c in per_class),
        },
        per_class=tuple(per_class),
        images=len(collected.images),
        images_in_set=len(a),
        ground_truth=int((~difficult).sum()),
        difficult=int(difficult.sum()),
        detections=len(rows),
        dropped=int(collected.dropped.sum()),
    )


def match_boxes(detection_keys: Int, detections: Float, keys: Int, boxes: Float) -> Int:
    """Row in `boxes` of the one that each detection overlaps most, `(N,)`;
    -1 where that is below `THRESHOLD`.

    Keys stand for an image and a class: a detection is compared with the boxes of its key only, and
    takes the first of those that it overlaps equally. Boxes are `(..., 4)` x, y, width, height.
    """
    order = np.argsort(keys, kind="stable")
    first, last = (np.searchsorted(keys[order], detection_keys, side) for side in ("left", "right"))
    detection, rank = ragged(last - first)  # each detection with every box in question
    box = order[first[detection] + rank]
    overlap = iou(_corners(detections[detection]), _corners(boxes[box])).numpy()
    best_first = np.lexsort((-overlap, detection))
    detection, place = np.unique(detection[best_first], return_index=True)
    best = best_first[place]
    matched = np.full(len(detections), -1, dtype=np.int64)
    matched[detection] = np.where(overlap[best] >= THRESHOLD, box[best], -1)
    return matched


def _corners(boxes: Float) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1))


def average_precision(hits: Bool, total: int) -> tuple[float | None, float | None]:
    """Area and 11-point average of one class;
    `hits (N,)`, best first, of detections for `total` boxes.

    None where there is no box.
    """
    if not total:
        return None, None
    reached = hits.cumsum()
    precision = reached / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    # Where each recall is first reached, in whole numbers; past the end, where the envelope is 0,
    # if never.
    steps = np.searchsorted(10 * reached, np.arange(11) * total)
    return float(envelope[:-1][hits].sum() / total), float(envelope[steps].mean())
