"""A data set's annotations in flat arrays.

Loader workers are forked copies: a Python object that is merely looked at has its reference count
written, and its memory page is copied. Flat arrays have no such counts, so N workers share one copy
(see tests/data/test_loader.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detrellis.data.classes import ClassMap

# From image ids and `lines` to COCO's `segmentation` of each object; None where it has none. Files
# are read for it.
SegmentationReader = Callable[[Sequence[int], Sequence[int]], list[Any]]


class Federation(NamedTuple):
    """What a federated set (LVIS) says of its images and classes, in the data set's own ids."""

    absent: NDArray[np.int64]  # (P, 2) image, and a class that it certainly lacks
    # (Q, 2) image, and a class of which not all objects are marked
    not_exhaustive: NDArray[np.int64]
    frequency: Mapping[int, str]  # r, c or f of each class: rare, common, frequent


@dataclass(frozen=True)
class Annotations:
    """`I` images and `T` boxes; image `i` owns the boxes `starts[i]:starts[i + 1]`."""

    root: Path  # folder that `file_names` are relative to
    classes: ClassMap
    image_ids: NDArray[np.int64]  # (I,) the data set's own
    file_names: NDArray[np.bytes_]  # (I,) fixed-width UTF-8
    sizes: NDArray[np.int64]  # (I, 2) height, width
    starts: NDArray[np.int64]  # (I + 1,)
    boxes: NDArray[np.float64]  # (T, 4) x, y, width, height in pixels, as COCO stores them
    labels: NDArray[np.int64]  # (T,) class index 0..C-1
    crowd: NDArray[np.bool_]  # (T,) crowd regions: not trained on, ignored in evaluation
    areas: NDArray[np.float64]  # (T,) COCO's `area`, or width * height
    ids: NDArray[np.int64]  # (T,) annotation ids
    source: Path | None = None  # the file that lists them, where there is one
    lines: NDArray[np.int64] | None = None  # (T,) place in the file that lists it
    # What reads the objects' outlines; None: there are boxes only
    segmentations: SegmentationReader | None = None
    # (T,) VOC: hard to recognise, which its own metric forgives; else None
    difficult: NDArray[np.bool_] | None = None
    federation: Federation | None = None  # of LVIS; None: every class is looked for in every image

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def box_rows(self) -> NDArray[np.int64]:
        """`(T,)` index of the image that owns each box."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / bytes(self.file_names[index]).decode()
